"""Two checkpoints that open but don't fit each other, or hold values that can't be compared."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.hostile.case import Case
from tests.hostile.writing import CONFIG, GATE, values

Tensors = dict[str, Tensor]
_RESHAPED = (
    "reshaped",
    "not compared: the shapes differ",
    f"1 parameters have another shape (first: {GATE})",
)
Change = Callable[[Tensors], object]

_EMBED, _NORM, _DOWN = "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


def tensors(*, seed: int = 0) -> Tensors:
    """Return the tiny model of the corpus; with another seed, a model near to it."""
    return {name: torch.from_numpy(value) for name, value in values(seed=seed).items()}


def save(folder: Path, found: Tensors, **settings: object) -> Path:
    """Write a model into one file, with its config."""
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in found.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **settings}))
    return folder


def _pair(root: Path, *, base: Change | None, tuned: Change | None, more: tuple[str, ...] = ()) -> list[str]:
    """Save nearly the same model twice; either may be changed."""
    folders = []
    for name, change, seed in (("base", base, 0), ("tuned", tuned, 1)):
        found = tensors(seed=seed)
        if change is not None:
            change(found)
        folders.append(str(save(root / name, found)))
    return ["diff", *folders, *more]


def _put(name: str, value: float, *, at: object = (0, 0)) -> Change:
    """Set one element."""

    def change(found: Tensors) -> None:
        found[name][at] = value  # type: ignore[index]

    return change


def _every(change: Callable[[Tensor], Tensor], *, only: str = "") -> Change:
    def changed(found: Tensors) -> None:
        found.update({name: change(value) for name, value in found.items() if only in name})

    return changed


def _without(*parts: str) -> Change:
    def changed(found: Tensors) -> None:
        for name in [name for name in found if any(part in name for part in parts)]:
            del found[name]

    return changed


def _same(found: Tensors) -> None:
    found.update(tensors())


def _bits(found: Tensors) -> None:
    """Use NaN of other bits at the same place."""
    found.update(tensors())
    found[GATE].view(torch.int32)[0, 0] = 0x7FC00001


def _renamed(found: Tensors) -> None:
    for name in list(found):
        found[f"other.{len(found)}.{name.rpartition('.')[0]}.thing"] = found.pop(name)


def _moved(found: Tensors) -> None:
    """Move a layer one further."""
    for name in list(found):
        found[name.replace("layers.1", "layers.7")] = found.pop(name)


def _more(found: Tensors) -> None:
    """Add a third layer."""
    second = {name: value for name, value in found.items() if "layers.1" in name}
    found.update({name.replace("layers.1", "layers.2"): value.clone() for name, value in second.items()})


def _longer(found: Tensors) -> None:
    found[_EMBED] = torch.cat([found[_EMBED], torch.ones(8, 8)])


def _rounded(found: Tensors) -> None:
    found.update({name: value.bfloat16() for name, value in tensors().items()})


def _drawn(seed: int) -> Change:
    """Draw the weights of another model."""
    draw = torch.Generator().manual_seed(seed)
    return _every(lambda value: torch.randn(value.shape, generator=draw.manual_seed(seed)))


def _set(name: str, value: Tensor) -> Change:
    return lambda found: found.update({name: value})


_LEFT_OUT = "values are NaN or infinite and are left out of every other measure"
_ZERO, _COMPLEX = _every(torch.zeros_like), _every(lambda value: value + 1j)
_INTEGERS, _TRUTHS = _every(lambda value: (9 * value).long()), _every(lambda value: value > 0)
_EMPTY, _FLAT = _every(lambda value: value[:0], only=GATE), _every(lambda value: value.reshape(-1))
_STILL = "The language model did not move at all: its drift is exactly zero."
_CAST = "parameters have another dtype on the two sides"
# name, what is done to base and to tuned, what must be said
_TOLD: tuple[tuple[str, Change | None, Change | None, tuple[str, ...]], ...] = (
    ("NaN in tuned", None, _put(GATE, np.nan), (f"1 {_LEFT_OUT}",)),
    ("NaN in base", _put(GATE, np.nan), None, (f"1 {_LEFT_OUT}",)),
    ("NaN on both sides", _put(GATE, np.nan), _put(GATE, np.nan), (f"1 {_LEFT_OUT}",)),
    ("NaN of other bits", _put(GATE, np.nan), _bits, (f"1 {_LEFT_OUT}",)),
    ("infinity in tuned", None, _put(GATE, -np.inf), (f"1 {_LEFT_OUT}",)),
    ("infinity of either sign", _put(GATE, np.inf), _put(GATE, -np.inf), (f"1 {_LEFT_OUT}",)),
    ("nothing but NaN in tuned", None, _every(lambda value: value * np.nan), (_LEFT_OUT,)),
    ("a matrix of NaN", None, _every(lambda value: value * np.nan, only=GATE), (f"128 {_LEFT_OUT}",)),
    ("the largest numbers", _put(GATE, 3e38), _put(GATE, -3e38), ("paired",)),
    ("the smallest numbers", _every(lambda v: v * 1e-40), _every(lambda v: v * 1e-40), ("paired",)),
    ("tuned is zero", None, _ZERO, ("15 weights of tuned are all zeros",)),
    ("base is zero", _ZERO, None, ("15 weights of base are all zeros",)),
    ("both are zero", _ZERO, _ZERO, (_STILL, "identical")),
    ("negative zero", _ZERO, _every(lambda value: -torch.zeros_like(value)), (_STILL,)),
    ("nothing moved", None, _same, (_STILL, "identical")),
    ("bfloat16 and float32", _every(Tensor.bfloat16), None, (f"16 compared {_CAST}", "bfloat16 → float32")),
    (
        "only rounding",
        None,
        _rounded,
        ("16 of 16 parameters that moved changed only by rounding to another", _CAST),
    ),
    ("float64", _every(Tensor.double), _every(Tensor.double), ("float64",)),
    ("whole numbers", _INTEGERS, _INTEGERS, ("int64",)),
    ("whole numbers of 63 bits", None, _set(GATE, torch.full((16, 8), 2**62)), ("float32 → int64",)),
    ("truth values", _TRUTHS, _TRUTHS, ("bool",)),
    ("complex numbers", _COMPLEX, _COMPLEX, ("complex64",)),
    ("complex numbers in tuned", None, _COMPLEX, ("float32 → complex64",)),
    ("fp8 on one side", None, _every(lambda v: v.to(torch.float8_e4m3fn), only=GATE), ("float8_e4m3fn",)),
    ("a flat matrix", None, _every(lambda value: value.reshape(-1), only=GATE), _RESHAPED),
    ("a matrix that broadcasts", None, _every(lambda value: value[:, :1], only=GATE), _RESHAPED),
    ("a number for a matrix", None, _set(GATE, torch.tensor(1.0)), _RESHAPED),
    ("a turned matrix", None, _every(lambda value: value.T, only=GATE), _RESHAPED),
    ("a dimension more", None, _every(lambda value: value[None], only=GATE), _RESHAPED),
    ("a matrix without elements", None, _EMPTY, _RESHAPED),
    ("no elements on either side", _EMPTY, _EMPTY, ("paired",)),
    ("a longer vocabulary", None, _longer, ("resized", "the rows that both sides have were compared")),
    ("no vocabulary", None, _set(_EMBED, torch.ones(0, 8)), ("resized",)),
    ("a wider vocabulary", None, _set(_EMBED, torch.ones(32, 9)), ("reshaped",)),
    ("a layer more", None, _more, ("language has 2 layers in base and 3 in tuned", "only-tuned")),
    ("a layer fewer", None, _without("layers.1"), ("2 layers in base and 1 in tuned", "only-base")),
    ("a layer further on", None, _moved, ("only-base", "only-tuned", "layers.7.")),
    ("a parameter fewer", None, _without(_DOWN), ("only-base", f"stored in base alone (first: {_DOWN})")),
    ("a parameter more", None, _set("model.x.weight", torch.ones(4, 4)), ("only-tuned", "model.x.weight")),
    ("one matrix alone", None, _without("self_attn", "mlp.up", "mlp.down", "norm", "embed"), ("only-base",)),
)

_NONE = "parameters of tuned (llama) has a partner of its shape in base"
_REFUSED: tuple[tuple[str, Change | None, Change | None, tuple[str, ...]], ...] = (
    ("no common name", None, _renamed, (_NONE, "Is this the right base?")),
    ("norms alone in common", None, _without("mlp", "self_attn", "embed"), (_NONE,)),
    ("every matrix flat", None, _FLAT, (_NONE,)),
    ("strangers", _drawn(1), _drawn(2), ("base is probably not the base of",)),
)


def _one(root: Path, *, more: tuple[str, ...]) -> list[str]:
    folder = str(save(root / "model", tensors()))
    return ["diff", folder, folder, *more]


def _case(name: str, build: partial[list[str]], says: tuple[str, ...], *, told: bool = True) -> Case:
    return Case(f"pair: {name}", "pairs", build, "told" if told else "refused", says)


_ALL = ("--detail", "heads,neurons,exact", "--spectra", "2", "--align")
CASES: tuple[Case, ...] = (
    *(_case(name, partial(_pair, base=base, tuned=tuned), says) for name, base, tuned, says in _TOLD),
    *(
        _case(f"{name}, in full", partial(_pair, base=base, tuned=tuned, more=_ALL), says)
        for name, base, tuned, says in _TOLD
    ),
    *(
        _case(name, partial(_pair, base=base, tuned=tuned), says, told=False)
        for name, base, tuned, says in _REFUSED
    ),
    _case("one path twice", partial(_one, more=()), ("its drift is exactly zero",)),
    _case("one path twice, in full", partial(_one, more=_ALL), ("its drift is exactly zero",)),
)
