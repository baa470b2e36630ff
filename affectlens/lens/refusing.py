"""Models in which a change would be lost, half made or not be undone: refused before anything is touched."""

from torch import Tensor, nn

from affectlens.errors import LensError
from affectlens.lens.running import answering
from affectlens.sites import Site


def refuse_compiled(model: nn.Module) -> None:
    """Raise `LensError` where a part of the model is compiled: its graph would pass hooks by."""
    for name, module in model.named_modules():
        if _compiled(module):
            raise LensError(
                f"{name or type(module).__name__} is compiled, and a compiled graph sees no hook. Wrap the "
                f"model before it is compiled; to `generate` give disable_compile=True"
            )


def refuse_whole(model: nn.Module) -> None:
    """Raise `LensError` for an omni model of several, of which only one answers: a door is to that one."""
    if answering(model) is not model:
        name = type(model).__name__
        raise LensError(
            f"{name} is several models, and its thinker answers; open the door of that one: "
            f"al.Lens(lens.model.thinker, lens.processor)"
        )


def _compiled(module: nn.Module) -> bool:
    """Whether a module was compiled in one of the four ways there are: the last is `generate`'s own."""
    own = vars(module)
    return (
        type(module).__name__ == "OptimizedModule"
        or own.get("_compiled_call_impl") is not None
        or hasattr(own.get("forward"), "_torchdynamo_orig_callable")
        or own.get("_compiled_call") is not None
    )


def refuse_unlike(site: Site, parameter: Tensor) -> None:
    """Raise `LensError` for a parameter whose values can't be swapped by setting its data."""
    data = parameter.data
    if data.device.type == "meta":
        raise LensError(f"{site} is offloaded, so its weights can't be swapped; load without offloading")
    counts = isinstance(parameter, nn.Parameter)  # a buffer may well hold whole numbers
    if data.itemsize < 2 or (counts and not data.is_floating_point()):
        raise LensError(
            f"{site} is quantised ({data.dtype}), so no weights can be put there; load it unpacked"
        )
    if type(data) not in (Tensor, nn.Parameter):
        kind = type(data).__name__
        raise LensError(f"{site} is a {kind}, whose values lie elsewhere; load the model without it")
