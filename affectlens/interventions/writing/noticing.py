"""What a reader of an edited checkpoint should know, and its files do not say by themselves."""

from collections import Counter
from collections.abc import Iterator

from affectlens.checkpoints import Checkpoint, pair
from affectlens.errors import NothingToCompare
from affectlens.interventions.deleting import deletions
from affectlens.interventions.scale import Scale
from affectlens.interventions.zero import Zero
from affectlens.sites import Site, Sites, sections

# Activations that map zero to zero, by how configs call them; of any other nothing is said.
_THROUGH_ZERO = ("silu", "swish", "gelu", "relu", "mish", "tanh")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj", "act_fn")


def notices(
    live: Checkpoint, intervention: object, *, sites: Sites, donor: Checkpoint | None
) -> Iterator[str]:
    """What must not be overlooked of one intervention, in sentences."""
    towers = Counter(site.tower for site in sites)
    if len(towers) > 1:
        counts = ", ".join(f"{tower} {count}" for tower, count in towers.most_common())
        yield f"The selection spans towers ({counts} sites)."
    if donor is not None and not any(donor.targeted(site) for site in sites):
        yield f"{donor.store.name} does not touch these sites, so nothing changes."
    if isinstance(intervention, Zero) or (isinstance(intervention, Scale) and intervention.factor == 0):
        yield from deletions(live, sites, starts_at_zero=lambda site: _through_zero(live, site))


def not_carried_over(base: Checkpoint, donor: Checkpoint) -> tuple[str, ...]:
    """What tells two whole checkpoints apart beside weights; nothing where they share too little to say."""
    try:
        return pair(base, donor).unlike
    except NothingToCompare:
        return ()


def _through_zero(live: Checkpoint, site: Site) -> bool:
    """Whether the config names an activation that maps zero to zero."""
    settings = sections(live.config, [site.tower])[site.tower]
    stated = next((settings[key] for key in _ACTIVATIONS if key in settings), "")
    return isinstance(stated, str) and any(name in stated for name in _THROUGH_ZERO)
