"""The timed functions: the read floor, `affectlens.diff`, and three alternatives to it.

Each takes the folders of base and tuned and returns its measures by tensor, so that a test can compare
them. None is slower than necessary: where torch has two ways, the faster one is used.
"""

import json
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import affectlens as al
from benchmarks.diff.generating import INDEX

Found = dict[str, dict[str, float]]
MEASURES = (
    "frobenius", "base_norm", "mean_abs", "max_abs", "cosine", "changed", "sign_flips", "nonfinite",
)  # fmt: skip


def floor(base: Path, tuned: Path, *, block: int) -> int:
    """Read both sides once into one buffer in whole pages, and return the number of bytes."""
    buffer, done = memoryview(mmap.mmap(-1, block)), 0
    for file in (*files(base), *files(tuned)):
        descriptor, at = os.open(file, os.O_RDONLY), 0
        try:
            while got := os.preadv(descriptor, [buffer], at):
                at += got
        finally:
            os.close(descriptor)
        done += at
    return done


def ours(base: Path, tuned: Path) -> Found:
    """Run `affectlens.diff` with its standard measures."""
    rows = al.diff(base, tuned, progress=False).frame
    values = rows[list(MEASURES)].to_dict("records")
    return {str(name): row for name, row in zip(rows["parameter"], values, strict=True)}  # type: ignore[misc]


def opened(base: Path, tuned: Path) -> list[al.Checkpoint]:
    """Open both sides and lay out their sites: the part that grows with names, not with bytes."""
    return [al.open_checkpoint(side) for side in (base, tuned)]


def measures(base: Path, tuned: Path) -> Found:
    """Compute the same measures in torch, over `safe_open`, a tensor at a time, with sums in float64."""
    return {name: _measured(b, t) for name, b, t in _tensors(base, tuned)}


def loop(base: Path, tuned: Path) -> Found:
    """Compute the two norms as in a notebook: rounded to bf16, summed in float32."""
    return {name: _norms(b, t) for name, b, t in _tensors(base, tuned)}


def loaded(base: Path, tuned: Path) -> Found:
    """Build both models with transformers, and run the same loop over their parameters."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    one, other = (
        load(side, local_files_only=True, dtype=torch.bfloat16).state_dict() for side in (base, tuned)
    )
    stored = _places(base)
    return {name: _norms(b, other[name]) for name, b in one.items() if name in stored}


def files(folder: Path) -> list[Path]:
    """Return the shards of a side."""
    return sorted(folder.glob("*.safetensors"))


def _measured(b: Tensor, t: Tensor) -> dict[str, float]:
    x, y = b.float().reshape(-1), t.float().reshape(-1)
    d = y - x
    wide, narrow = x.double(), d.double()
    dd, bb, bd = torch.dot(narrow, narrow), torch.dot(wide, wide), torch.dot(wide, narrow)
    absolute = narrow.abs_()
    values = {
        "frobenius": dd.sqrt(),
        "base_norm": bb.sqrt(),
        "mean_abs": absolute.mean(),
        "max_abs": absolute.max(),
        "cosine": (bb + bd) / (bb * (bb + 2 * bd + dd)).sqrt(),
        "changed": torch.count_nonzero(d),
        "sign_flips": torch.count_nonzero(x * y < 0),
        "nonfinite": d.numel() - torch.count_nonzero(torch.isfinite(d)),
    }
    return {name: float(value) for name, value in values.items()}


def _norms(b: Tensor, t: Tensor) -> dict[str, float]:
    frobenius, base = float((t - b).float().norm()), float(b.float().norm())
    return {"frobenius": frobenius, "relative": frobenius / base}


def _tensors(base: Path, tuned: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield both sides of each tensor, as safetensors maps them."""
    one, other = _places(base), _places(tuned)
    with ExitStack() as stack:

        def opened(folder: Path, names: set[str]) -> dict[str, Any]:
            return {name: stack.enter_context(safe_open(folder / name, "pt")) for name in names}

        sides = opened(base, set(one.values())), opened(tuned, set(other.values()))
        for name in one:
            yield name, sides[0][one[name]].get_tensor(name), sides[1][other[name]].get_tensor(name)


def _places(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found
