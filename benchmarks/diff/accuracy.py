"""Compare the norms of a diff with sums in float64, over every tensor of a pair."""

import json
from collections.abc import Iterator
from math import sqrt
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import affectlens as al
from benchmarks.diff.generating import INDEX

_BLOCK = 1 << 22  # elements


def worst(base: Path, tuned: Path) -> dict[str, float]:
    """Return the largest relative errors of `frobenius` and `base_norm`; raises if tensors are missing."""
    frame = al.diff(base, tuned, progress=False).frame
    rows = {str(row["parameter"]): row for row in frame.to_dict("records")}
    places: dict[str, str] = json.loads((base / INDEX).read_text())["weight_map"]
    if set(rows) != set(places):
        raise ValueError(f"not the same tensors: {sorted(set(rows) ^ set(places))}")
    errors = {"frobenius": 0.0, "base_norm": 0.0}
    for name, file in places.items():
        dd = bb = 0.0
        for b, t in _blocks(base / file, tuned / file, name):
            d = t - b
            dd, bb = dd + float(torch.dot(d, d)), bb + float(torch.dot(b, b))
        for measure, exact in (("frobenius", sqrt(dd)), ("base_norm", sqrt(bb))):
            errors[measure] = max(errors[measure], _error(float(rows[name][measure]), exact))
    return errors


def _error(found: float, exact: float) -> float:
    if found == exact:
        return 0.0
    return abs(found / exact - 1) if exact else float("inf")


def _blocks(base: Path, tuned: Path, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both sides in float64, some rows at a time."""
    with safe_open(base, "pt") as one, safe_open(tuned, "pt") as other:
        sides = one.get_slice(name), other.get_slice(name)
        rows, *width = sides[0].get_shape()
        step = max(1, _BLOCK // (width[0] if width else 1))
        for start in range(0, rows, step):
            b, t = (side[start : start + step].double().reshape(-1) for side in sides)
            yield b, t
