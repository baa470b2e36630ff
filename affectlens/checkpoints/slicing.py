"""Take a site out of its stored tensor and put it back: experts, slices, transposes, heads and neurons."""

import math

import torch
from einops import rearrange
from torch import Tensor

from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.store import Header, Store
from affectlens.sites import Cut, Storage

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtypes by bytes


def tensor_of(span: Span, header: Header, *, rows: slice | None = None) -> Tensor:
    """Read a tensor from its bytes, or some of its rows, into new memory."""
    shape = header.shape
    if rows is not None:
        first, last, _ = rows.indices(shape[0])
        width = (span.stop - span.start) // max(shape[0], 1)
        span, shape = span.part(first * width, last * width), (last - first, *shape[1:])
    kind: torch.dtype = getattr(torch, header.dtype)
    buffer = torch.empty(span.stop - span.start, dtype=torch.uint8)
    target = buffer.numpy().data
    got = span.fetch(0, len(target), into=target)
    # Memory returns a view and leaves the buffer empty; copied, the result never shares memory.
    if got.obj is not target.obj:
        target[:] = got
    return buffer.view(kind).reshape(shape) if len(target) else torch.empty(shape, dtype=kind)


def some(store: Store, where: Storage, *, wanted: slice) -> Tensor:
    """Read some rows of a site; only their bytes are fetched, if they are stored in one run."""
    cut = where.cut
    # These sites are not runs of stored rows, so the whole site is taken first.
    if where.transposed or where.expert is not None or where.unit is not None:
        return take(store.read(where.tensor, rows(where)), where)[wanted]
    if cut is None or cut.dim:
        fetched = store.read(where.tensor, wanted)
        return fetched if cut is None else take(fetched, where)
    part, period = cut.stop - cut.start, cut.period
    if period is None:
        return store.read(where.tensor, slice(cut.start + wanted.start, cut.start + wanted.stop))
    # The wanted rows are spread over periods of the stored tensor: whole periods are read, then cut.
    first, last = wanted.start // part, math.ceil(wanted.stop / part)
    groups = store.read(where.tensor, slice(first * period, last * period))
    return take(groups, where)[wanted.start - first * part : wanted.stop - first * part]


def contiguous(where: Storage, header: Header) -> tuple[int, int] | None:
    """Return the first and last + 1 element of the stored tensor that a site is; None if not one run."""
    shape, cut = header.shape, where.cut
    start, stop = 0, math.prod(shape)
    if where.expert is not None:
        each = math.prod(shape[1:])
        start, stop = where.expert * each, (where.expert + 1) * each
    if cut is not None:
        outer = 0 if where.expert is None else 1
        if cut.dim != outer or cut.period is not None:
            return None
        width = math.prod(shape[cut.dim + 1 :])
        start, stop = start + cut.start * width, start + cut.stop * width
    return None if where.unit is not None else (start, stop)


def rows(where: Storage) -> slice | None:
    """Return the rows of the stored tensor that hold a site; None for all rows."""
    if where.expert is not None:
        return slice(where.expert, where.expert + 1)
    cut = where.cut
    # A cut that repeats with a period takes rows from every period, so it is not one run.
    return slice(cut.start, cut.stop) if cut and cut.dim == 0 and cut.period is None else None


def take(fetched: Tensor, where: Storage) -> Tensor:
    """Return the values of a site, given the rows that `rows` names; a view if possible."""
    whole = _whole(fetched, where)
    unit = where.unit
    return whole if unit is None else whole.narrow(unit.dim, unit.start, unit.stop - unit.start)


def put(stored: Tensor, where: Storage, *, value: Tensor) -> None:
    """Write the values of a site into its stored tensor, in place."""
    target = stored if where.expert is None else stored[where.expert]
    if where.unit is not None:
        # A head or neuron is set within its whole site, which is then written back.
        whole = _whole(_fetched(stored, where), where).clone()
        whole.narrow(where.unit.dim, where.unit.start, where.unit.stop - where.unit.start).copy_(value)
        value = whole
    value = _turned(value, where)
    if where.cut is None:
        target.copy_(value)
        return
    cut = _below_expert(where)
    part = cut.stop - cut.start
    _parts(target, cut).copy_(
        rearrange(value.movedim(cut.dim, 0), "(group part) ... -> group part ...", part=part)
    )


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, so that NaN equals NaN and 0.0 is not −0.0."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    kind = _BITS[one.element_size()]
    return torch.equal(one.contiguous().view(kind), two.contiguous().view(kind))


def _whole(fetched: Tensor, where: Storage) -> Tensor:
    if where.expert is not None:
        fetched = fetched[0]
    elif rows(where) is not None:
        return _turned(fetched, where)
    if where.cut:
        fetched = _joined(_parts(fetched, _below_expert(where)), _below_expert(where).dim)
    return _turned(fetched, where)


def _fetched(stored: Tensor, where: Storage) -> Tensor:
    some = rows(where)
    return stored if some is None else stored[some]


def _below_expert(where: Storage) -> Cut:
    cut = where.cut
    assert cut is not None
    return cut if where.expert is None else cut._replace(dim=cut.dim - 1)


def _parts(tensor: Tensor, cut: Cut) -> Tensor:
    period = cut.period or tensor.shape[cut.dim]
    groups = rearrange(tensor.movedim(cut.dim, 0), "(group period) ... -> group period ...", period=period)
    found: Tensor = groups[:, cut.start : cut.stop]
    return found


def _joined(parts: Tensor, dim: int) -> Tensor:
    flat: Tensor = rearrange(parts, "group part ... -> (group part) ...")
    return flat.movedim(0, dim)


def _turned(values: Tensor, where: Storage) -> Tensor:
    return values.mT if where.transposed and values.ndim >= 2 else values
