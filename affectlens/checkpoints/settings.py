"""Compare the configs of two checkpoints, setting by setting."""

from collections.abc import Mapping
from typing import Any

# Settings that a save writes and no forward pass reads.
_BOOKKEEPING = {
    "_attn_implementation", "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype",
    "eos_token_id", "finetuning_task", "id2label", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "return_dict", "tokenizer_class", "torch_dtype",
    "transformers_version", "transformers_weights", "use_cache", "use_return_dict",
}  # fmt: skip
_MOST = 6  # settings listed


def differing(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the settings that differ, nested ones by their path: at most six, then how many more.

    A setting that only one config states is not compared, since the other side may use the same default.

    >>> differing({"text_config": {"rope_theta": 1e4}}, {"text_config": {"rope_theta": 1e6}, "dtype": "x"})
    ('text_config.rope_theta (10000.0 → 1000000.0)',)
    """
    if _is_modern(base) or _is_modern(tuned):
        base, tuned = _modern(base), _modern(tuned)
    found = list(_differences(base, tuned, ""))
    more = [f"{len(found) - _MOST} more"] if len(found) > _MOST else []
    return (*found[:_MOST], *more)


def _is_modern(config: Mapping[str, Any]) -> bool:
    return any(
        name == "rope_parameters" or (isinstance(value, Mapping) and _is_modern(value))
        for name, value in config.items()
    )


def _modern(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config in the current layout, with all rotary settings in `rope_parameters`."""
    found = {
        name: _modern(value) if isinstance(value, Mapping) and name != "rope_parameters" else value
        for name, value in config.items()
    }
    # Older versions of transformers write `rope_theta` and `rope_scaling` instead of `rope_parameters`.
    if "rope_theta" not in found or "rope_parameters" in found:
        return found
    scaling = found.pop("rope_scaling", None)
    found["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": found.pop("rope_theta"),
        **(scaling if isinstance(scaling, Mapping) else {}),
    }
    return found


def _differences(base: Mapping[str, Any], tuned: Mapping[str, Any], path: str) -> list[str]:
    found = []
    for name in sorted((base.keys() & tuned.keys()) - _BOOKKEEPING):
        one, two = base[name], tuned[name]
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found += _differences(one, two, f"{path}{name}.")
        elif one != two:
            found.append(f"{path}{name} ({str(one)[:40]} → {str(two)[:40]})")
    return found
