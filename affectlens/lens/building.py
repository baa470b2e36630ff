"""Build a model from its config, and give it the very tensors that the checkpoint holds.

    cleaned config ──▶ class ──▶ a model without memory ◀── tensors, each read when its turn comes

transformers gets no path to weights: it would open files by its own rules, and maybe others than those that
were checked and compared. What it still does is to name, fuse and tie them as the class wants them.
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
_ONE_BY_ONE = re.compile(r"layer|depth|block|stage|label|expert|head|position|codebook|group", re.IGNORECASE)
# Other settings may be negative: a layer from the end, a token that is none, a window without a limit.
_COUNT = re.compile(
    r"(?:num|n)_(?:\w*_)?(?:layers?|heads?|experts|blocks|channels|labels|embd)|d_model|depths?|head_dim"
    r"|(?:\w*_)?(?:hidden|intermediate|vocab|patch)_size",
    re.IGNORECASE,
)
_FEW, _MANY = 10_000, 100_000_000  # what is made in no time; what a table of positions may have
_TIMES, _MORE = 4, 10_000_000  # a model may have tied and unsaved parameters beside those in its files
_BUFFERS = 2_000_000_000  # elements that a model works out for itself: masks, tables of positions


def build(
    room: Path, checkpoint: Checkpoint, *, places: Mapping[str, Any], dtype: torch.dtype | None, code: bool
) -> nn.Module:
    """The model of a folder of copies, its weights from the checkpoint. Raises `LensError`, and what breaks.

    `dtype` None is the one that the config or most of the files say. `places` is what transformers is told of
    where its parts go.
    """
    from transformers import AutoConfig, GenerationConfig, PreTrainedModel

    config = AutoConfig.from_pretrained(room, trust_remote_code=code, local_files_only=True)
    chosen, config = _chosen(config, room, code=code)
    options: dict[str, Any] = {"dtype": dtype or torch_dtype(str(config.dtype)) or _commonest(checkpoint)}
    if tokens := _special_tokens(room / "generation_config.json"):
        options["generation_config"] = GenerationConfig(**tokens)
    weights = {tensor: _Later(checkpoint, tensor) for tensor in checkpoint.store.headers}
    weights |= {alias: weights[tensor] for alias, tensor in checkpoint.store.aliases.items()}
    # The base class's own: a class may have one that looks for further files.
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
    """Raise `LensError` for a config with more layers, or other things made one by one, than tensors.

    Nor can there be fewer than none of what is counted.
    """
    name, tensors = checkpoint.store.name, len(checkpoint.store.headers)
    for path, value in _numbers(checkpoint.config, ""):
        key = path.rpartition(".")[2]
        if _COUNT.fullmatch(key) and value < 0:
            raise LensError(
                f"{name}: config.json says {quoted(path)} = {value:,}, and less than none is no model"
            )
        most = _MANY if "position" in key.lower() else max(_FEW, tensors)
        if _ONE_BY_ONE.search(key) and value > most:
            raise LensError(
                f"{name}: config.json says {quoted(path)} = {value:,}, and the files hold {tensors:,} tensors"
            )


def _chosen(config: Any, room: Path, *, code: bool) -> tuple[Any, Any]:
    """The class of a model, and the part of the config that it is built from. Raises `LensError`."""
    import transformers
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
    from transformers.models.auto.auto_factory import get_class_from_dynamic_module as own

    named = getattr(config, "auto_map", None) if code else None
    for task in (*(f"For{task}" for task in _TASKS), ""):
        if isinstance(named, Mapping) and (reference := named.get(f"AutoModel{task}")):
            found = own(reference, str(room), local_files_only=True)
            return add_generation_mixin_to_remote_model(found), config
    # What the files were saved from; an automatic class may take a part, as it does of Whisper its decoder.
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
    raise LensError(
        f"transformers knows no model of type {quoted(config.model_type)} that could be loaded here"
    )


def _part(config: Any, built: Any) -> Any:
    """The config that a class is built from: all of it, or what it says of its language model."""
    text = config.get_text_config()
    return next((part for part in (config, text) if isinstance(part, built.config_class)), None)


def _special_tokens(file: Path) -> dict[str, Any]:
    """Where answers begin and end; how they are sought is not for a file to say."""
    found = parse(file.read_bytes(), file).content if file.exists() else {}
    return {
        key: value
        for key, value in found.items()
        if key.endswith("_token_id")
        and all(type(token) is int for token in (value if isinstance(value, list) else [value]))
    }


def _commonest(checkpoint: Checkpoint) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for where in checkpoint.storage.values():
        stored = torch_dtype(checkpoint.store.headers[where.tensor].dtype)
        if stored is not None:
            sizes[stored] += where.size
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


class _Later:
    """A tensor that is read when transformers asks for it, as it does of safetensors files."""

    def __init__(self, checkpoint: Checkpoint, tensor: str) -> None:
        self._store, self._tensor = checkpoint.store, tensor

    def __getitem__(self, _: object) -> torch.Tensor:
        return self._store.read(self._tensor)


@contextmanager
def _bounded(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise `LensError` as soon as a model that is built in the block is much larger than its files."""
    most = {
        "parameters": _TIMES * checkpoint.parameters + _MORE,
        "buffers": _TIMES * checkpoint.parameters + _BUFFERS,
    }
    found = dict.fromkeys(most, 0)
    thread = threading.get_ident()

    def count(what: str, tensor: Tensor | None) -> None:
        # Without memory it is built, with memory it is loaded; that counts nothing twice.
        if tensor is None or not tensor.is_meta or threading.get_ident() != thread:
            return
        found[what] += tensor.numel()
        if found[what] > most[what]:
            path, value = max(_numbers(checkpoint.config, ""), key=lambda number: number[1], default=("", 0))
            largest = f"Its largest setting: {quoted(path)} = {value:,}"
            raise LensError(
                f"{checkpoint.store.name}: config.json asks for a model of more than {most[what]:,} {what}, "
                f"and the files hold {checkpoint.parameters:,} parameters. {largest}"
            )

    with ExitStack() as stack:
        for register, what in (
            (module.register_module_parameter_registration_hook, "parameters"),
            (module.register_module_buffer_registration_hook, "buffers"),
        ):
            handle = register(lambda _, __, tensor, what=what: count(what, tensor))
            stack.callback(handle.remove)
        yield


def _numbers(config: Any, path: str) -> Iterator[tuple[str, int]]:
    """Every whole number in a config, with its path."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list):
        for value in config[:1000]:
            yield from _numbers(value, path)
    elif type(config) is int:
        yield path, config


def _refuse_random(checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    name = checkpoint.store.name
    for key, stored, wanted in sorted(info["mismatched_keys"], key=str):
        raise LensError(
            f"{name}: {quoted(key)} is {tuple(stored)} in the files, and config.json makes it {tuple(wanted)}"
        )
    random = sorted(map(str, info["missing_keys"]))
    if random:
        more = f" and {len(random) - 3} more" if len(random) > 3 else ""
        named = ", ".join(key if key.isprintable() else quoted(key) for key in random[:3])
        why = next((f"Not read was {quoted(key)}: {why}" for key, (why, _) in checkpoint.skipped.items()), "")
        why = why or "Is this a whole checkpoint of that model?"
        raise LensError(f"{name}: the files lack {named}{more}, which would be random weights. {why}")
