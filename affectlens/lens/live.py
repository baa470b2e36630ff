"""Live: a running model as hooks, swaps and interventions see it; `Lens` is one.

The parts of the lens and every intervention name this class, so that none of them imports the lens.
Below it: which part of a model answers, where its input goes, and which models can't be changed.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint, Source
from affectlens.checkpoints.adapters.attached import adapter_layers
from affectlens.checkpoints.memory import modules_of
from affectlens.errors import LensError, warn
from affectlens.lens.current import Current
from affectlens.lens.inputs.prompt_format import PromptFormat
from affectlens.sites import Site, Sites
from affectlens.tasks import Example

ANSWER: ContextVar[int] = ContextVar("ANSWER", default=0)  # how many last tokens of an input are its answer
UNSEEN: ContextVar[bool] = ContextVar("UNSEEN", default=False)  # no hook takes note of the running pass


class Live(ABC):
    """A model in memory with its processor, its parameters by name, and the same parameters by site."""

    model: nn.Module
    processor: Any
    source: Checkpoint | None  # the checkpoint on disk that the model was loaded from
    told: set[str]  # remarks made so far; each is made once
    known: Current  # what was looked up of the model
    adapters_off: bool = False  # whether it runs the model without its adapters
    shown: Checkpoint | None = None  # the checkpoint that a block shows instead of the live one
    reads_padding: bool | None = None  # whether padding changes its answers; None until it is measured

    @property
    @abstractmethod
    def checkpoint(self) -> Checkpoint:
        """The live parameters, seen as a checkpoint."""

    @property
    def sites(self) -> Sites:
        """All sites, the same as in the checkpoint on disk."""
        return self.checkpoint.sites

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, Tensor]:
        """The live parameters and persistent buffers, by the model's own names; tied ones once."""

    @property
    @abstractmethod
    def prompt_format(self) -> PromptFormat:
        """The way in which prompts are written for this model. Raises `LensError` without a processor."""

    @abstractmethod
    def prepare(self, *examples: Example, prompt: str = "{text}") -> dict[str, Tensor]:
        """Turn examples into one batch of model input."""

    def without_adapter(self) -> Self:
        """Return a lens of the same model that runs it without its adapters: the base.

        Each of its runs and blocks switches all adapters off, and puts their state back after it. It is also
        a donor: `al.Transplant(sites, donor=lens.without_adapter())`; and a block, in which the model has no
        adapters for any lens: `with lens.without_adapter(): lens.logits(example)`. Raises `LensError` for a
        model without adapters and, when it runs, for adapters that are merged into the weights.
        """
        _refuse_without_layers(self.model)
        found = copy.copy(self)
        found.known, found.adapters_off = Current(), True
        return found


def over(live: Live, model: nn.Module, *, processor: Any) -> Live:
    """Return `live` over another model, e.g. a copy of its own; the two share the remarks made so far."""
    found = copy.copy(live)
    found.model, found.processor, found.source = model, processor, None
    found.known = Current()
    return found


def as_donor(source: "Source | Live") -> Source:
    """Return a donor in a form that can be opened; of a lens, its weights from before any intervention."""
    return source.checkpoint.untouched if isinstance(source, Live) else source


def remark(live: Live, words: str) -> None:
    """Warn with a `Remark`, once for each live model, at the user's line."""
    if words not in live.told:
        live.told.add(words)
        warn(words)


def _refuse_without_layers(model: nn.Module) -> None:
    """Raise `LensError` for a model without adapters that can be switched off layer by layer."""
    if next(adapter_layers(model), None) is not None:
        return
    if hasattr(model, "disable_adapter"):
        raise LensError(
            "the adapter of this model has no layers of its own (prompt tuning). Use PEFT's block: "
            "with lens.model.disable_adapter(): …"
        )
    raise LensError(f"this {type(model).__name__} has no adapter, so the lens is already without one")


def refuse_compiled(model: nn.Module) -> None:
    """Raise `LensError` where a part of the model is compiled: a compiled graph bypasses hooks."""
    for module in modules_of(model):
        if compiled(module):
            name = next(name for name, one in model.named_modules() if one is module)
            raise LensError(
                f"{name or type(module).__name__} is compiled, and a compiled graph runs no hooks. Make the "
                f"lens before compiling; pass disable_compile=True to `generate`"
            )


def refuse_whole(model: nn.Module) -> None:
    """Raise `LensError` for an omni model: a door opens only its part that answers in text."""
    if answering(model) is not model:
        name = type(model).__name__
        raise LensError(
            f"{name} contains several models, and its thinker answers in text; make a lens of that one: "
            f"al.Lens(lens.model.thinker, lens.processor)"
        )


def compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled, in any of four ways; the last is that of `generate`."""
    own = vars(module)
    return (
        type(module).__name__ == "OptimizedModule"
        or own.get("_compiled_call_impl") is not None
        or ("forward" in own and hasattr(own["forward"], "_torchdynamo_orig_callable"))
        or own.get("_compiled_call") is not None
    )


def refuse_unlike(site: Site, parameter: Tensor) -> None:
    """Raise `LensError` for a parameter that can't be swapped by setting its `data`."""
    data = parameter.data
    if data.device.type == "meta":
        raise LensError(f"{site} is offloaded, so its weights can't be swapped; load without offloading")
    counts = isinstance(parameter, nn.Parameter)  # a buffer may hold integers
    if data.itemsize < 2 or (counts and not data.is_floating_point()):
        raise LensError(
            f"{site} is quantised ({data.dtype}), so its weights can't be swapped; load the model unquantised"
        )
    if type(data) not in (Tensor, nn.Parameter):
        kind = type(data).__name__
        raise LensError(
            f"{site} is a {kind}, which stores its values in other tensors; load the model without it"
        )


def inner(model: nn.Module) -> nn.Module:
    """Unwrap PEFT's wrapper, where there is one."""
    unwrap = getattr(model, "get_base_model", None)  # a model that PEFT put adapters into has no wrapper
    found: nn.Module = model if unwrap is None else unwrap()
    return found


def answering(model: nn.Module) -> nn.Module:
    """Return the part of a model that answers in text: the thinker of an omni model, else the model.

    PEFT's wrapper is kept around it, since it adds the virtual tokens of prompt tuning.
    """
    thinker = getattr(inner(model), "thinker", None)
    return thinker if isinstance(thinker, nn.Module) else model


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer, alone or inside a processor; None without one."""
    return getattr(processor, "tokenizer", processor)


def config_of(model: nn.Module) -> Any:
    """Return the config of the part that answers; None for a module without one."""
    return getattr(inner(answering(model)), "config", None)


def encodes(model: nn.Module) -> bool:
    """Return whether an encoder reads the prompt and a decoder answers."""
    return getattr(config_of(model), "is_encoder_decoder", False) is True


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the input embedding; if it is offloaded, the device it runs on."""
    part = inner(answering(model))
    try:
        embedding = part.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    for module in (embedding, part):
        runs = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if runs is not None:
            return torch.device(runs)
        here = next((p.device for p in module.parameters() if not p.is_meta), None) if module else None
        if here is not None:
            return here
    return torch.device("cpu")
