"""Take a site out of the tensor it is stored in, and put it back: experts, slices, transposes."""

from einops import rearrange
from torch import Tensor

from affectlens.sites import Cut, Storage


def rows(where: Storage) -> slice | None:
    """The rows of the stored tensor that a reader has to fetch; None for all."""
    if where.expert is not None:
        return slice(where.expert, where.expert + 1)
    cut = where.cut
    # Only a slice of what is laid end to end is one run of rows.
    return slice(cut.start, cut.stop) if cut and cut.dim == 0 and cut.period is None else None


def take(fetched: Tensor, where: Storage) -> Tensor:
    """The values of a site, given the rows that `rows` asked for; a view where there can be one."""
    whole = _whole(fetched, where)
    unit = where.unit
    return whole if unit is None else whole.narrow(unit.dim, unit.start, unit.stop - unit.start)


def _whole(fetched: Tensor, where: Storage) -> Tensor:
    if where.expert is not None:
        fetched = fetched[0]
    elif rows(where) is not None:
        return _turned(fetched, where)
    if where.cut:
        fetched = _joined(_parts(fetched, _below_expert(where)), _below_expert(where).dim)
    return _turned(fetched, where)


def put(stored: Tensor, where: Storage, *, value: Tensor) -> None:
    """Write a site's values into the tensor it is stored in."""
    target = stored if where.expert is None else stored[where.expert]
    if where.unit is not None:
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
