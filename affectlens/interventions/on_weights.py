"""Zero: delete what a site carries, or what passes a point."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint, Source
from affectlens.interventions.edits import (
    Edit,
    Edits,
    Places,
    elementwise,
    finite,
    keep,
    only_sites,
    points_of,
    selected,
    sites_of,
)
from affectlens.interventions.transplant import fitting_donor
from affectlens.lens import Lens, Rewrite, module_name
from affectlens.sites import Point, Points, Site, Sites

_PARTS = ("gate_proj", "up_proj", "down_proj")
_MLP = ("tower", "stack", "layer", "expert", "label")  # what they share
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "hidden_act", "activation_func")


@dataclass(frozen=True)
class Zero:
    """Set weights, or activations, to zero.

    In a gated MLP act(gate)·up with act(0) = 0 and no biases, zeroing gate, up or down gives the same
    logits, those without the MLP: such a result can't speak for the gate. Where that holds of what is
    zeroed, a `Remark` says so.
    """

    places: Sites | Points

    def __init__(self, places: Places) -> None:
        keep(self, places=selected(places))

    def edits(self, live: Checkpoint) -> Edits:
        """Zeros of each site's shape; none for points."""
        return Edits(sites_of(self.places), elementwise(live, torch.zeros_like))

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """Zeros at each point; none for sites."""
        return dict.fromkeys(points_of(self.places), lambda values, _: torch.zeros_like(values))

    def remarks(self, lens: Lens) -> Sequence[str]:
        """Whether this deletes whole MLPs."""
        return deleted_mlps(lens, zeroed(self))


@dataclass(frozen=True)
class Scale:
    """Multiply weights, or activations, by `factor`; 1 changes nothing."""

    places: Sites | Points
    factor: float

    def __init__(self, places: Places, *, factor: float) -> None:
        keep(self, places=selected(places), factor=finite("factor", factor))

    def edits(self, live: Checkpoint) -> Edits:
        """Each site's weights times the factor, computed in their dtype; none for points."""
        return Edits(sites_of(self.places), elementwise(live, self._scaled))

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """What passes each point times the factor; none for sites."""
        return dict.fromkeys(points_of(self.places), lambda values, _: self._scaled(values))

    def remarks(self, lens: Lens) -> Sequence[str]:
        """Whether this deletes whole MLPs, as a factor of 0 can."""
        return deleted_mlps(lens, zeroed(self))

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self.factor == 1 else values * self.factor


@dataclass(frozen=True)
class Randomise:
    """Replace sites' weights by Gaussian noise of the same Frobenius norm.

    With a `donor`, only the change W_donor − W is replaced by noise of its norm. The noise of a site depends
    on `seed` and the site alone, so other sites beside it change nothing. Raises as `Transplant` does.
    """

    sites: Sites
    seed: int
    donor: Source | None = field(repr=False)

    def __init__(self, sites: Places, *, seed: int = 0, donor: Source | None = None) -> None:
        keep(self, sites=only_sites(sites, "Randomise"), seed=seed, donor=donor)

    def edits(self, live: Checkpoint) -> Edits:
        """Noise instead of each site's weights, or of their change."""
        return Edits(self.sites, _replaced(self, live, _noise), rowwise=False)


@dataclass(frozen=True)
class Shuffle:
    """Put the entries of each site's weights in another order, drawn by `seed`.

    With a `donor`, those of the change W_donor − W. Raises as `Transplant` does.
    """

    sites: Sites
    seed: int
    donor: Source | None = field(repr=False)

    def __init__(self, sites: Places, *, seed: int = 0, donor: Source | None = None) -> None:
        keep(self, sites=only_sites(sites, "Shuffle"), seed=seed, donor=donor)

    def edits(self, live: Checkpoint) -> Edits:
        """The same entries elsewhere, or those of the change."""
        return Edits(self.sites, _replaced(self, live, _shuffled), rowwise=False)


def zeroed(intervention: object) -> Sites:
    """Return the sites whose weights an intervention sets to zero; none of any other intervention."""
    if isinstance(intervention, Zero) or (isinstance(intervention, Scale) and intervention.factor == 0):
        return sites_of(intervention.places)
    return Sites(())


def deleted_mlps(lens: Lens, sites: Sites) -> Sequence[str]:
    """Say so where zeroing gates, ups or downs, or neurons of them, deletes what the MLP makes of them."""
    return deletions(lens.checkpoint, sites, starts_at_zero=lambda site: _starts_at_zero(lens, site))


def deletions(live: Checkpoint, sites: Sites, *, starts_at_zero: Callable[[Site], bool]) -> Sequence[str]:
    """The same of a checkpoint, given whether the activation beside a matrix maps zero to zero.

    act(gate)·up is zero where gate is, if act(0) = 0, or where up is, unless a bias is added. What can't be
    established is not said.
    """
    parts = frozenset(site for site in sites if site.role in _PARTS)
    if not parts:
        return ()
    mlps = Sites(site for site in live.sites if site.role in _PARTS).by(*_MLP)
    found = [
        site
        for site in parts
        if site.param == "weight" and _deletes(site, mlps[_key(site)], parts) and starts_at_zero(site)
    ]
    if not found:
        return ()
    roles = ", ".join(sorted({site.role for site in found}))
    words = (
        f"Zeroing {roles} deletes the MLP (act(0) = 0, no bias): gate, up and down give the same logits then"
    )
    return (f"{words}, so this does not speak for one of them.",)


def _key(site: Site) -> tuple[object, ...]:
    return tuple(getattr(site, name) for name in _MLP)


def _deletes(site: Site, family: Sites, zeroed: frozenset[Site]) -> bool:
    matrices = [one for one in family if one.param == "weight"]
    if zeroed.issuperset(one.at(neuron=site.neuron) for one in matrices):
        return False  # whoever zeroes all three means the MLP
    biased = {one.role for one in family if one.param == "bias" and one.at(neuron=site.neuron) not in zeroed}
    roles = {one.role for one in matrices}
    # Either factor alone makes the product zero; of down it is said only where the others would do the same.
    factors = {"gate_proj", "up_proj"} if site.role == "down_proj" else {site.role}
    return roles == set(_PARTS) and not biased & factors


def _starts_at_zero(lens: Lens, site: Site) -> bool:
    """Whether the activation beside a matrix maps zero to zero."""
    own = module_name(lens.checkpoint.at(site))
    for around in (own, own.rpartition(".")[0]):  # stacked experts hold their activation themselves
        module: nn.Module = lens.model.get_submodule(around)
        act = next(
            (getattr(module, name) for name in _ACTIVATIONS if callable(getattr(module, name, None))), None
        )
        if act is not None:
            return not bool(act(torch.zeros(1)).any())
    return False


Meaningless = Callable[[Tensor, torch.Generator], Tensor]


def _replaced(which: Randomise | Shuffle, live: Checkpoint, meaningless: Meaningless) -> Edit:
    donor = None if which.donor is None else fitting_donor(which.donor, live, sites=which.sites)

    def edit(site: Site, wanted: slice | None = None) -> Tensor:
        here = live.read(site)
        generator = torch.Generator().manual_seed(_seed(which.seed, site))
        # On the CPU: the generators of devices draw other numbers.
        ours = here.cpu().float()
        if donor is None:
            new = meaningless(ours, generator)
        else:
            new = ours + meaningless(donor.read(site).cpu().float() - ours, generator)
        new = new.to(device=here.device, dtype=here.dtype)
        return new if wanted is None else new[wanted]

    return edit


def _noise(values: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(values.shape, generator=generator)
    size = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return drawn * (size / max(float(torch.linalg.vector_norm(drawn, dtype=torch.float64)), 1e-300))


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(values.numel(), generator=generator)
    return values.reshape(-1)[order].reshape(values.shape)


def _seed(seed: int, site: Site) -> int:
    # Python's own hash of a text is another in each process.
    return int.from_bytes(hashlib.sha256(f"{seed} {site!r}".encode()).digest()[:7])
