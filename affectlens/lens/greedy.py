"""Generate greedily, whatever the model's own generation settings say, or as the caller asks.

A checkpoint may sample, search with beams, punish repetition, suppress or force tokens, stop at strings or
return a dictionary. Answers would then depend on settings beside the weights that are compared.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from affectlens.checkpoints.memory import modules_of
from affectlens.errors import LensError
from affectlens.lens.live import Live, remark
from affectlens.lens.restoring import Swaps

# The tokens that begin and end an answer are the model's own.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# A compiled step would bypass hooks; without a cache each step would look like a new prompt.
_SEEN = {
    "disable_compile": True,
    "use_cache": True,
    "cache_implementation": "dynamic",
    "prefill_chunk_size": None,
}
_ANSWERS = "lens.generate returns one text per example; call model.generate inside lens.intervene for more"
_REFUSED = {
    **dict.fromkeys(_SEEN, "interventions and spans follow a dynamic cache step by step"),
    **dict.fromkeys(("num_return_sequences", "return_dict_in_generate"), _ANSWERS),
    "max_new_tokens": "give it as max_new_tokens=",
    "generation_config": "give its settings by name",
}
# These don't change an answer: its length is given, and its text alone is returned.
_SILENT = (
    "max_length",
    "transformers_version",
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *_REFUSED,
)


def settings_for(live: Live, asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings of a generation: greedy, and what the caller asked for.

    A `Remark` says which settings of the model are not used. Raises `LensError` for a setting with which
    answers could not be read or interventions could not follow.
    """
    asked = dict(asked or {})
    for name in _REFUSED.keys() & asked.keys():
        raise LensError(f"settings={{{name!r}: …}} can't be used: {_REFUSED[name]}")
    unused = {
        f"{name}={value!r}"
        for part in _configured(live.model)
        for name, value in _set(part.generation_config).items()
        if name not in asked and name not in _SILENT
    }
    if unused:
        remark(
            live,
            f"lens.generate answers greedily, so these generation settings of the model are not used: "
            f"{', '.join(sorted(unused))}. To use one, pass it: settings={{…}}",
        )
    return {**_SEEN, **asked}


@contextmanager
def greedily(model: nn.Module) -> Iterator[None]:
    """Put the generation settings of a model, and of models in it, back to their defaults for a block."""
    swaps = Swaps()
    swaps.open()
    try:
        for part in _configured(model):
            swaps.swap(part, "generation_config", value=_plain(part.generation_config))
        yield
    finally:
        swaps.undo()


def _configured(model: nn.Module) -> list[Any]:
    """Return the parts of a model that have generation settings: some generate with a model inside them."""
    return [part for part in modules_of(model) if vars(part).get("generation_config") is not None]


def _set(config: Any) -> dict[str, Any]:
    """Return the settings that are not transformers' defaults, apart from the tokens of an answer."""
    from transformers import GenerationConfig

    usual = {**vars(GenerationConfig()), **GenerationConfig._get_default_generation_params()}
    return {
        name: value
        for name, value in vars(config).items()
        if name in usual and name not in _TOKENS and name[0] != "_" and value not in (None, usual[name])
    }


def _plain(config: Any) -> Any:
    """Return a copy of settings with transformers' defaults; what only this model has is kept."""
    from transformers import GenerationConfig

    found = copy.deepcopy(config)
    for name, value in vars(GenerationConfig()).items():
        if name not in _TOKENS and name[0] != "_":
            setattr(found, name, value)
    return found
