"""Measure one part: read a block of every side, and pass it to the engine while it is in the cache."""

import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from affectlens.checkpoints.adapters.low_rank import LowRank
from affectlens.drift import torch_engine
from affectlens.drift.measures import BESIDE, Engine, Field, Measure, Sums
from affectlens.drift.parts import WIDTHS, Part, Strip
from affectlens.drift.torch_engine import squares, values
from affectlens.sites import Units

Block = tuple[int, int, tuple[Tensor, ...]]  # rows from and to, and each side's values
BLOCK = 1 << 20  # bytes of a side: the sums are taken while both are in a core's cache
FAR_BLOCK = 1 << 23  # bytes on a hub: each block is one request
_WORDS = {"bfloat16": np.uint32, "float16": np.int32, "float32": np.uint64}
_local = threading.local()
Blocks = Callable[[Part], Iterator[tuple[int, int, tuple[Tensor, ...]]]]


@dataclass(frozen=True)
class Summing:
    """Measures parts by an engine; `custom` holds the user's own measures."""

    engine: Engine
    custom: Mapping[str, Measure] = field(default_factory=dict)

    def __call__(self, part: Part) -> Sums:
        """Measure the sums of a part."""
        if part.strip.unread:
            control = np.zeros(len(BESIDE)) if len(part.strip.sides) > 2 else None
            return Sums(size=(part.stop - part.start) * part.strip.width, control=control, read=False)
        if part.strip.factors is not None:
            return factored(part, _blocks, square=self._square)
        sums = self._by_words(part) if part.strip.spans is not None else None
        if sums is None:  # the sides differ in dtype, or some value is not finite
            sums = Sums()
            for _, _, sides in _blocks(part):
                sums.merge(self._by_numbers(*sides))
        if part.strip.units is not None or self.custom:
            self._extras(part, sums)
        return sums

    def _by_words(self, part: Part) -> Sums | None:
        """Measure raw bytes by the engine; None where some value is not finite."""
        strip = part.strip
        row = strip.width * WIDTHS[strip.dtype]
        assert strip.spans is not None
        same = strip.spans[0].key == strip.spans[1].key
        sums = Sums(size=(part.stop - part.start) * strip.width)
        beside = np.zeros(len(BESIDE))
        block = FAR_BLOCK if any(span.of.remote for span in strip.spans) else BLOCK
        buffers = _Buffer.of_this_thread(len(strip.spans), block)
        kind = _WORDS[strip.dtype]
        for start in range(part.start * row, part.stop * row, block):
            stop = min(start + block, part.stop * row)
            sides = [
                buffer.words(span.fetch(start, stop, into=buffer.memory), kind)
                for number, (span, buffer) in enumerate(zip(strip.spans, buffers, strict=True))
                if not (same and number == 1)
            ]
            if same:
                sides.insert(1, sides[0])
                self.engine.still(sides[0], sums.vector)
            else:
                self.engine.measure((sides[0], sides[1]), sums.vector)
            if len(sides) == 3:
                self.engine.beside(tuple(sides), beside)
        sums.control = beside if len(strip.spans) == 3 else None
        lost = sums["changed"] and not sums["dd"]  # the squares underflow float32
        known = np.isfinite(sums.vector).all() and np.isfinite(beside).all() and not lost
        return sums if known else None

    def _by_numbers(self, base: Tensor, tuned: Tensor, control: Tensor | None = None) -> Sums:
        """Measure numbers by the engine if float32 holds them and all are finite, else in float64."""
        sides = [torch_engine.values(side) for side in (base, tuned, control) if side is not None]
        if {side.dtype for side in sides} != {torch.float32}:
            return torch_engine.measure_tensors(base, tuned, control=control)
        words = [_words(side) for side in sides]
        sums = Sums(size=base.numel(), rounds=torch_engine.only_rounded(base, tuned))
        self.engine.measure((words[0], words[1]), sums.vector)
        beside = np.zeros(len(BESIDE))
        if control is not None:
            self.engine.beside(tuple(words), beside)
            sums.control = beside
        known = np.isfinite(sums.vector).all() and np.isfinite(beside).all()
        return sums if known else torch_engine.measure_tensors(base, tuned, control=control)

    def _square(self, block: Tensor) -> float:
        """Return Σ b² of a block."""
        if block.dtype == torch.float32:
            vector = Sums().vector
            self.engine.still(_words(block), vector)
            if np.isfinite(vector[Field.BB]):
                return float(vector[Field.BB])
        return float(block.double().square().sum())

    def _extras(self, part: Part, sums: Sums) -> None:
        for start, stop, (base, tuned, *_) in _blocks(part):
            if part.strip.units is not None:
                found = _units(part.strip, (start, stop), base, tuned)
                sums.units = found if sums.units is None else sums.units + found
            for name, measure in self.custom.items():
                flat = (torch_engine.values(side).reshape(-1) for side in (base, tuned))
                value = float(measure(*flat))
                sums.custom[name] = sums.custom.get(name, 0.0) + value


def factored(part: Part, blocks: Blocks, *, square: Callable[[Tensor], float]) -> Sums:
    """Measure a part whose Δ is given by factors; `blocks` reads base, `square` gives Σ b² of a block.

    NaN and infinite values of base are counted, and left out of its norm alone.
    """
    strip = part.strip
    assert strip.factors is not None
    delta, control = strip.factors
    rows = slice(part.start, part.stop)
    b, a, _ = delta.factors
    across = a.T.float()
    scale = delta.scale_up_to_alpha
    sums = Sums(
        size=(part.stop - part.start) * strip.width, elementwise=False, scaled=delta.scale is not None
    )
    sums.vector[Field.DD] = scale**2 * _product(delta, delta, rows)
    if control is not None:
        other = control.scale_up_to_alpha
        cc, cd = other**2 * _product(control, control, rows), scale * other * _product(delta, control, rows)
        sums.control = np.array([cc, cd, math.nan, math.nan, 0.0])
        sums.control_scaled = control.scale is not None
    elif len(strip.sides) > 2:  # the control did not change this site
        sums.control = np.zeros(len(BESIDE))
    units = strip.units
    if units is not None:
        sums.units = np.zeros((2, units.count))
        sums.units[0] = scale**2 * by_unit(units, _lines(delta, rows, units.dim), first=part.start)[0]
    for start, stop, (base, *_) in blocks(part):
        block = values(base).reshape(stop - start, -1)
        norm = square(block)
        if not math.isfinite(norm):
            finite = torch.isfinite(block)
            sums.nonfinite += int((~finite).sum())
            block = torch.where(finite, block, 0.0)
            norm = square(block)
        if units is not None and sums.units is not None:
            sums.units[1] += by_unit(units, squares(block, block, dim=units.dim), first=start)[1]
        inner = (block @ across.to(block.dtype)).double() * b[start:stop]
        sums.vector[Field.BD] += scale * float(inner.sum())
        sums.vector[Field.BB] += norm
    return sums


def by_unit(units: Units, lines: "NDArray[np.float64]", *, first: int) -> "NDArray[np.float64]":
    """Add up rows or columns by head or neuron; rows begin with number `first`."""
    found = np.zeros((len(lines), units.count))
    begin = first if units.dim == 0 else 0
    numbers = np.arange(begin, begin + lines.shape[1]) // units.size
    for line, total in zip(lines, found, strict=True):
        np.add.at(total, numbers, line)
    return found


class _Buffer:
    """Memory of one thread for one side, in whole pages: reading into these is several times faster."""

    def __init__(self, size: int) -> None:
        self.memory = memoryview(mmap.mmap(-1, size + mmap.PAGESIZE))

    @staticmethod
    def of_this_thread(count: int, size: int) -> "list[_Buffer]":
        known: list[_Buffer] = getattr(_local, "buffers", [])
        if len(known) < count or len(known[0].memory) < size:
            known = [_Buffer(size) for _ in range(count)]
            _local.buffers = known
        return known[:count]

    def words(self, found: memoryview, kind: Any) -> Any:
        """Return bytes as words of two values each; a single last value is followed by zero."""
        whole = -(-len(found) // 8) * 8
        if found.obj is not self.memory.obj:
            view = np.frombuffer(found, np.uint8)
            if whole == len(found) and view.ctypes.data % 8 == 0:
                return view.view(kind)
            self.memory[: len(found)] = found
        self.memory[len(found) : whole] = bytes(whole - len(found))
        return np.frombuffer(self.memory, kind, count=whole // np.dtype(kind).itemsize)


def _words(block: Tensor) -> Any:
    """Return float32 values as words of two values each; a single last value is followed by zero."""
    flat = block.reshape(-1)
    if flat.numel() % 2 or flat.data_ptr() % 8:
        flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
    return flat.numpy().view(_WORDS["float32"])


def _units(strip: Strip, rows: tuple[int, int], base: Tensor, tuned: Tensor) -> Any:
    """Return squares by head or neuron from a block of some rows or all columns."""
    units, (start, _) = strip.units, rows
    assert units is not None
    return by_unit(units, torch_engine.squares(base, tuned, dim=units.dim), first=start)


def _blocks(part: Part) -> Iterator[Block]:
    """Yield the values of each side, some rows at a time."""
    strip, sides = part.strip, part.strip.sides[:1] if part.strip.factors else part.strip.sides
    step = max(1, torch_engine.BLOCK * 4 // max(strip.width, 1))
    read = [_reader(strip, number) for number in range(len(sides))]
    for start in range(part.start, part.stop, step):
        stop = min(start + step, part.stop)
        yield start, stop, torch_engine.alike(tuple(side(start, stop) for side in read))


def _reader(strip: Strip, number: int) -> Callable[[int, int], Tensor]:
    side, site = strip.sides[number], strip.site
    if strip.spans is not None:
        span, row = strip.spans[number], strip.width * WIDTHS[strip.dtype]
        kind: torch.dtype = getattr(torch, strip.dtype)
        shape = (-1, strip.width) if strip.units or strip.width > 1 else (-1,)
        return lambda start, stop: (
            torch.frombuffer(span.part(start * row, stop * row).read(), dtype=torch.uint8)
            .view(kind)
            .reshape(shape)
        )
    if strip.picked is not None:
        return lambda start, stop: strip.read(number, rows=slice(start, stop)).cpu().contiguous()
    if not side.by_rows(site):
        whole = side.read(site).cpu()
        whole = whole if whole.ndim else whole.reshape(1)
        return lambda start, stop: whole[start:stop].contiguous()
    return lambda start, stop: side.read(site, slice(start, stop)).cpu().contiguous()


def _product(one: LowRank, two: LowRank, rows: slice) -> float:
    """Return ⟨B·A, B'·A'⟩ over some rows, without the scales."""
    (b, a, gram), (c, d, _) = one.factors, two.factors
    across = gram if one is two else a @ d.T
    return float(((b[rows].T @ c[rows]) * across).sum())


def _lines(delta: LowRank, rows: slice, dim: int) -> Any:
    """Return the squared norm of each row or column of B·A over some rows, as (1, lines)."""
    b, a, gram = delta.factors
    if dim == 0:
        return (((b[rows] @ gram) * b[rows]).sum(1))[None].numpy()
    return (((b[rows].T @ b[rows]) @ a) * a).sum(0)[None].numpy()
