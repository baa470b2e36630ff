"""Zero and Scale, of weights or activations; Randomise and Shuffle, of weights.

A zeroed gate, up or down projection can delete its whole MLP: `deletions` says where that holds.
"""

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
    only_sites,
    points_of,
    selected,
    set_fields,
    sites_of,
)
from affectlens.interventions.transplant import fitting_donor
from affectlens.lens import Live, Rewrite, module_name
from affectlens.sites import Point, Points, Site, Sites

_PARTS = ("gate_proj", "up_proj", "down_proj")
_MLP = ("tower", "stack", "layer", "expert", "label")  # equal for the matrices of one MLP
# Attributes under which modules of transformers keep their activation function.
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "hidden_act", "activation_func")

Draw = Callable[[Tensor, torch.Generator], Tensor]  # from values to as many others, drawn by the generator


@dataclass(frozen=True)
class Zero:
    """Set weights or activations to zero.

    In a gated MLP act(gate)·up with act(0) = 0 and no biases, zeroing gate, up or down gives the same
    logits, those without the MLP. Such a result can't single out the gate; a `Remark` says so where it holds.

    >>> import affectlens as al
    >>> lens = al.load(al.load_demo().base)
    >>> gates = lens.sites.where(tower="language", role="gate_proj")
    >>> with lens.intervene(al.Zero(gates)):
    ...     lens.parameter(gates[0]).count_nonzero()
    tensor(0)
    """

    places: Sites | Points

    def __init__(self, places: Places) -> None:
        set_fields(self, places=selected(places))

    def edits(self, live: Checkpoint) -> Edits:
        """Return zeros in each site's shape; for points, no edits."""
        return Edits(sites_of(self.places), elementwise(live, torch.zeros_like))

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
        """Return zeros for each point; for sites, no rewrites."""
        return dict.fromkeys(points_of(self.places), lambda values, _: torch.zeros_like(values))

    def remarks(self, lens: Live) -> Sequence[str]:
        """Return a sentence where this deletes whole MLPs."""
        return deleted_mlps(lens, zeroed(self))


@dataclass(frozen=True)
class Scale:
    """Multiply weights or activations by `factor`; 1 changes nothing, 0 is `Zero`.

    Raises `LensError` for a factor that is not finite.

    >>> import affectlens as al
    >>> base = al.load_demo().base
    >>> gate = base.sites.where(tower="language", role="gate_proj")[0]
    >>> halved = al.Scale(gate, factor=0.5).edits(base)[gate]
    >>> bool((2 * halved == base.read(gate)).all())
    True
    """

    places: Sites | Points
    factor: float

    def __init__(self, places: Places, *, factor: float) -> None:
        set_fields(self, places=selected(places), factor=finite("factor", factor))

    def edits(self, live: Checkpoint) -> Edits:
        """Return each site's weights times the factor, computed in their dtype; for points, no edits."""
        return Edits(sites_of(self.places), elementwise(live, self._scaled))

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
        """Return what passes each point times the factor; for sites, no rewrites."""
        return dict.fromkeys(points_of(self.places), lambda values, _: self._scaled(values))

    def remarks(self, lens: Live) -> Sequence[str]:
        """Return a sentence where this deletes whole MLPs, as a factor of 0 can."""
        return deleted_mlps(lens, zeroed(self))

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self.factor == 1 else values * self.factor


@dataclass(frozen=True)
class Randomise:
    """Replace sites' weights by Gaussian noise of the same Frobenius norm.

    With a `donor`, only the change W_donor − W is replaced, by noise of the change's norm. The noise of a
    site depends on `seed` and the site alone: it is the same beside other sites and in another process.
    Raises what `Transplant` raises.

    >>> import affectlens as al
    >>> base = al.load_demo().base
    >>> gate = base.sites.where(tower="language", role="gate_proj")[0]
    >>> noise = al.Randomise(gate, seed=1).edits(base)[gate].float()
    >>> abs(float(noise.norm() / base.read(gate).float().norm()) - 1) < 0.01
    True
    """

    sites: Sites
    seed: int
    donor: Source | None = field(repr=False)

    def __init__(self, sites: Places, *, seed: int = 0, donor: Source | None = None) -> None:
        set_fields(self, sites=only_sites(sites, "Randomise"), seed=seed, donor=donor)

    def edits(self, live: Checkpoint) -> Edits:
        """Return noise in place of each site's weights, or of their change."""
        return Edits(self.sites, _replaced(self, live, _noise), rowwise=False)


@dataclass(frozen=True)
class Shuffle:
    """Permute the entries of each site's weights at random, by `seed`.

    With a `donor`, the entries of the change W_donor − W are permuted. Raises what `Transplant` raises.

    >>> import affectlens as al
    >>> base = al.load_demo().base
    >>> gate = base.sites.where(tower="language", role="gate_proj")[0]
    >>> shuffled = al.Shuffle(gate, seed=1).edits(base)[gate]
    >>> same = base.read(gate).flatten().sort().values == shuffled.flatten().sort().values
    >>> bool(same.all())
    True
    """

    sites: Sites
    seed: int
    donor: Source | None = field(repr=False)

    def __init__(self, sites: Places, *, seed: int = 0, donor: Source | None = None) -> None:
        set_fields(self, sites=only_sites(sites, "Shuffle"), seed=seed, donor=donor)

    def edits(self, live: Checkpoint) -> Edits:
        """Return the weights with their entries, or those of their change, permuted."""
        return Edits(self.sites, _replaced(self, live, _shuffled), rowwise=False)


def zeroed(intervention: object) -> Sites:
    """Return the sites whose weights an intervention sets to zero; an empty selection if it sets none."""
    if isinstance(intervention, Zero) or (isinstance(intervention, Scale) and intervention.factor == 0):
        return sites_of(intervention.places)
    return Sites(())


def deleted_mlps(lens: Live, sites: Sites) -> Sequence[str]:
    """Return `deletions` of a live model, whose modules say whether act(0) = 0."""
    return deletions(lens.checkpoint, sites, starts_at_zero=lambda site: _starts_at_zero(lens, site))


def deletions(live: Checkpoint, sites: Sites, *, starts_at_zero: Callable[[Site], bool]) -> Sequence[str]:
    """Return a sentence if zeroing these sites, whole or by neuron, does what zeroing their partners does.

    act(gate)·up is zero where gate is zero, if act(0) = 0, and where up is zero, unless a bias is added.
    `starts_at_zero` says whether act(0) = 0 for the MLP of a site; where that is unknown, nothing is claimed.
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
    words = f"Zeroing {roles} deletes the MLP (act(0) = 0, no bias)."
    return (f"{words} Zeroing gate, up or down gives the same logits, so the result can't single out one.",)


def _key(site: Site) -> tuple[object, ...]:
    return tuple(getattr(site, name) for name in _MLP)


def _deletes(site: Site, family: Sites, gone: frozenset[Site]) -> bool:
    matrices = [one for one in family if one.param == "weight"]
    if gone.issuperset(one.at(neuron=site.neuron) for one in matrices):
        return False  # to zero all three is to ask for the MLP's deletion
    biased = {one.role for one in family if one.param == "bias" and one.at(neuron=site.neuron) not in gone}
    roles = {one.role for one in matrices}
    # One zero factor makes the product zero. Zeroing down deletes the MLP in any case, but equals zeroing
    # gate or up only where neither has a bias.
    factors = {"gate_proj", "up_proj"} if site.role == "down_proj" else {site.role}
    return roles == set(_PARTS) and not biased & factors


def _starts_at_zero(lens: Live, site: Site) -> bool:
    """Return whether the activation of a matrix's MLP maps zero to zero; False where it is not found."""
    own = module_name(lens.checkpoint.at(site))
    # Stacked experts hold their activation themselves; for a plain matrix the module around it does.
    for around in (own, own.rpartition(".")[0]):
        module: nn.Module = lens.model.get_submodule(around)
        act = next(
            (getattr(module, name) for name in _ACTIVATIONS if callable(getattr(module, name, None))), None
        )
        if act is not None:
            return not bool(act(torch.zeros(1)).any())
    return False


def _replaced(which: Randomise | Shuffle, live: Checkpoint, draw: Draw) -> Edit:
    """Return the edit that draws a site anew, or its change where there is a donor."""
    donor = None if which.donor is None else fitting_donor(which.donor, live, sites=which.sites)

    def edit(site: Site, wanted: slice | None = None) -> Tensor:
        here = live.read(site)
        generator = torch.Generator().manual_seed(_seed(which.seed, site))
        # On the CPU, since a generator of another device draws other numbers from the same seed.
        ours = here.cpu().float()
        if donor is None:
            new = draw(ours, generator)
        else:
            new = ours + draw(donor.read(site).cpu().float() - ours, generator)
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
    # Not `hash`: Python salts it, so it differs from process to process.
    return int.from_bytes(hashlib.sha256(f"{seed} {site!r}".encode()).digest()[:7])
