"""Build a model from its config, and fill it with the tensors of the checkpoint.

    cleaned config ──▶ class ──▶ model without memory ◀── tensors, each read when transformers asks for it

transformers gets no path to the weights. It would choose files by its own rules, perhaps other files than
those that were checked and compared. It still names, fuses and ties the tensors as the class wants them.
"""

import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.documents import parse
from affectlens.errors import LensError, quoted
from affectlens.lens.isolation import torch_dtype

_TASKS = ("ImageTextToText", "Vision2Seq", "MultimodalLM", "CausalLM")
# transformers creates one object, or one entry of a list, for each of these.
_ONE_BY_ONE = re.compile(r"layer|depth|block|stage|label|expert|head|position|codebook|group", re.IGNORECASE)
# Counts and widths. Other settings may be negative: a layer from the end, no token, an unlimited window.
_COUNT = re.compile(
    r"(?:num|n)_(?:\w*_)?(?:layers?|heads?|experts|blocks|channels|labels|embd)|d_model|depths?|head_dim"
    r"|(?:\w*_)?(?:hidden|intermediate|vocab|patch)_size",
    re.IGNORECASE,
)
_FEW, _MANY = 10_000, 100_000_000  # objects that take no time to make; entries of a table of positions
_TIMES, _MORE = 4, 10_000_000  # room for tied and unsaved parameters beside those in the files
_BUFFERS = 2_000_000_000  # elements that a model computes itself: masks, tables of positions


def build(
    room: Path, checkpoint: Checkpoint, *, places: Mapping[str, Any], dtype: torch.dtype | None, code: bool
) -> nn.Module:
    """Build the model of a folder of copies, with the weights of the checkpoint.

    With `dtype` None the config decides, or the dtype of most parameters. `places` are the arguments for
    transformers that place the parts on devices. Raises `LensError`, and whatever breaks in transformers.
    """
    from transformers import AutoConfig, GenerationConfig, PreTrainedModel

    config = AutoConfig.from_pretrained(room, trust_remote_code=code, local_files_only=True)
    chosen, config = _chosen(config, room, code=code)
    options: dict[str, Any] = {"dtype": dtype or torch_dtype(str(config.dtype)) or _commonest(checkpoint)}
    if tokens := _special_tokens(room / "generation_config.json"):
        options["generation_config"] = GenerationConfig(**tokens)
    weights = {tensor: _Later(checkpoint, tensor) for tensor in checkpoint.store.headers}
    weights |= {alias: weights[tensor] for alias, tensor in checkpoint.store.aliases.items()}
    # The method of the base class: a subclass may have one that searches for more files.
    load = PreTrainedModel.from_pretrained.__func__
    with _bounded(checkpoint):
        model, info = load(
            chosen,
            None,
            config=config,
            state_dict=weights,
            ignore_mismatched_sizes=True,
            trust_remote_code=code,
            output_loading_info=True,
            **options,
            **places,
        )
    _refuse_random(checkpoint, info)
    found: nn.Module = model
    return found


def refuse_unreasonable(checkpoint: Checkpoint) -> None:
    """Raise `LensError` for a config with negative counts, or with more layers and the like than tensors.

    Such a config would keep transformers busy for hours before the first tensor is missed.
    """
    name, tensors = checkpoint.store.name, len(checkpoint.store.headers)
    for path, value in _numbers(checkpoint.config, ""):
        key = path.rpartition(".")[2]
        if _COUNT.fullmatch(key) and value < 0:
            raise LensError(
                f"{name}: config.json sets {quoted(path)} = {value:,}, but a count can't be negative"
            )
        most = _MANY if "position" in key.lower() else max(_FEW, tensors)
        if _ONE_BY_ONE.search(key) and value > most:
            raise LensError(
                f"{name}: config.json sets {quoted(path)} = {value:,}, but the files hold {tensors:,} tensors"
            )


def _chosen(config: Any, room: Path, *, code: bool) -> tuple[Any, Any]:
    """Choose the class of a model, and the part of the config that it takes. Raises `LensError`."""
    import transformers
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
    from transformers.models.auto.auto_factory import get_class_from_dynamic_module as own

    named = getattr(config, "auto_map", None) if code else None
    for task in (*(f"For{task}" for task in _TASKS), ""):
        if isinstance(named, Mapping) and (reference := named.get(f"AutoModel{task}")):
            found = own(reference, str(room), local_files_only=True)
            return add_generation_mixin_to_remote_model(found), config
    # `architectures` is the class that was saved. An automatic class may be a part of it: for Whisper,
    # AutoModelForCausalLM is the decoder alone.
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None) if isinstance(name, str) and "For" in name else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            part = _part(config, found)
            if part is not None:
                return found, part
    for task in _TASKS:
        mapping = getattr(getattr(transformers, f"AutoModelFor{task}", None), "_model_mapping", {})
        if type(config) in mapping:
            found = mapping[type(config)]
            found = found[0] if isinstance(found, tuple) else found
            return found, _part(config, found) or config
    raise LensError(f"transformers has no model of type {quoted(config.model_type)} that answers in text")


def _part(config: Any, built: Any) -> Any:
    """Return the config that a class takes: the whole one, or the section of its language model."""
    text = config.get_text_config()
    return next((part for part in (config, text) if isinstance(part, built.config_class)), None)


def _special_tokens(file: Path) -> dict[str, object]:
    """Read the tokens that begin and end an answer; ignore the file's settings for sampling and search."""
    found = parse(file.read_bytes(), file).content if file.exists() else {}
    return {
        key: value
        for key, value in found.items()
        if key.endswith("_token_id")
        and all(type(token) is int for token in (value if isinstance(value, list) else [value]))
    }


def _commonest(checkpoint: Checkpoint) -> torch.dtype:
    """Return the floating-point dtype of most parameters."""
    sizes: Counter[torch.dtype] = Counter()
    for where in checkpoint.storage.values():
        stored = torch_dtype(checkpoint.store.headers[where.tensor].dtype)
        if stored is not None:
            sizes[stored] += where.size
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


class _Later:
    """A tensor that is read when transformers indexes it, as it indexes slices of safetensors files."""

    def __init__(self, checkpoint: Checkpoint, tensor: str) -> None:
        self._store, self._tensor = checkpoint.store, tensor

    def __getitem__(self, _: object) -> torch.Tensor:
        return self._store.read(self._tensor)


@contextmanager
def _bounded(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise `LensError` as soon as a model built in the block grows much larger than its files."""
    most = {
        "parameters": _TIMES * checkpoint.parameters + _MORE,
        "buffers": _TIMES * checkpoint.parameters + _BUFFERS,
    }
    found = dict.fromkeys(most, 0)
    thread = threading.get_ident()

    def count(what: str, tensor: Tensor | None) -> None:
        # A model is built on the meta device, then each tensor is replaced by a loaded one, which must not
        # count again. Another thread may build a model of its own.
        if tensor is None or not tensor.is_meta or threading.get_ident() != thread:
            return
        found[what] += tensor.numel()
        if found[what] > most[what]:
            path, value = max(_numbers(checkpoint.config, ""), key=lambda number: number[1], default=("", 0))
            largest = f"Its largest setting: {quoted(path)} = {value:,}"
            raise LensError(
                f"{checkpoint.store.name}: config.json describes a model of more than {most[what]:,} {what}, "
                f"but the files hold {checkpoint.parameters:,} parameters. {largest}"
            )

    with ExitStack() as stack:
        for register, what in (
            (module.register_module_parameter_registration_hook, "parameters"),
            (module.register_module_buffer_registration_hook, "buffers"),
        ):
            handle = register(lambda _, __, tensor, what=what: count(what, tensor))
            stack.callback(handle.remove)
        yield


def _numbers(config: object, path: str) -> Iterator[tuple[str, int]]:
    """Yield every whole number in a config, with its path."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list):
        for value in config[:1000]:
            yield from _numbers(value, path)
    elif type(config) is int:
        yield path, config


def _refuse_random(checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    """Raise `LensError` for parameters that transformers filled with random numbers."""
    name = checkpoint.store.name
    for key, stored, wanted in sorted(info["mismatched_keys"], key=str):
        raise LensError(
            f"{name}: {quoted(key)} has shape {tuple(stored)} in the files, but config.json makes it "
            f"{tuple(wanted)}"
        )
    random = sorted(map(str, info["missing_keys"]))
    if random:
        more = f" and {len(random) - 3} more" if len(random) > 3 else ""
        named = ", ".join(key if key.isprintable() else quoted(key) for key in random[:3])
        why = next((f"Skipped: {quoted(key)} ({why})" for key, (why, _) in checkpoint.skipped.items()), "")
        why = why or "Is this a complete checkpoint of that model?"
        raise LensError(f"{name}: the files lack {named}{more}, so these weights would be random. {why}")
