"""A change of low rank, computed beside its matrix from what goes into it, as PEFT does."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from affectlens.checkpoints.adapters.lowrank import LowRank
from affectlens.lens.hooks.places import module_name, parameter_name, place_of
from affectlens.lens.refusing import refuse_unlike
from affectlens.sites import Point, Site

if TYPE_CHECKING:
    from affectlens.lens.lens import Lens


class Beside:
    """Add scale · B·A·x to what a matrix makes of x, unless it is `off`; `on` says that a block has it."""

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, features: Any) -> None:
        self._a, self._b, self._scale, self._features = a, b, scale, features
        self.on = self.off = False

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if self.off:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        more = nn.functional.linear(nn.functional.linear(x.to(self._a.dtype), self._a), self._b) * self._scale
        if self._features is None:
            return (output + more).to(output.dtype)
        new = output.clone()
        new[..., list(self._features)] += more.to(output.dtype)
        return new


def beside(lens: "Lens", site: Site, *, factors: LowRank) -> tuple[nn.Module, Beside]:
    """The hook of a site, and the module that it belongs to."""
    place = place_of(Point(site), model=lens.model, live=lens.checkpoint)
    like = lens.parameters[parameter_name(lens.checkpoint.at(site))]
    a, b = (factors.store.read(name).to(like.device) for name in (factors.pair.a, factors.pair.b))
    if factors.where.cut is not None:
        b = factors.factors.b.to(device=like.device, dtype=b.dtype)
    assert factors.scale is not None
    found = Beside(a, b, scale=factors.scale, features=place.features)
    return lens.model.get_submodule(place.module), found


def fits_beside(lens: "Lens", site: Site, *, factors: LowRank) -> bool:
    """Whether a change of low rank can be computed beside its matrix: of a plain one, on its rows."""
    if factors.decomposed or factors.pair.embedding or factors.scale is None:
        return False
    where = lens.checkpoint.at(site)
    refuse_unlike(site, lens.parameters[parameter_name(where)])
    cut = where.cut
    rows = cut is None or (cut.dim == 0) != where.transposed
    plain = isinstance(lens.model.get_submodule(module_name(where)), nn.Linear)
    return plain and rows and where.expert is None
