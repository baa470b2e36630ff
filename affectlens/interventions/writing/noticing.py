"""What a reader of an edited checkpoint should know, and its files do not say by themselves."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from affectlens.checkpoints import Checkpoint, pair
from affectlens.errors import NothingToCompare
from affectlens.interventions.scale import Scale
from affectlens.interventions.zero import Zero
from affectlens.sites import MLP, Site, Sites, sections

# Activations that map zero to zero, by how configs call them; of any other nothing is said.
_THROUGH_ZERO = ("silu", "swish", "gelu", "relu", "mish", "tanh")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj", "act_fn")


def notices(
    live: Checkpoint, intervention: object, sites: Sites, *, donor: Checkpoint | None
) -> Iterator[str]:
    """What must not be overlooked of one intervention, in sentences."""
    towers = Counter(site.tower for site in sites)
    if len(towers) > 1:
        counts = ", ".join(f"{tower} {count}" for tower, count in towers.most_common())
        yield f"The selection spans towers ({counts} sites)."
    if donor is not None and not any(donor.targeted(site) for site in sites):
        yield f"{donor.store.name} does not touch these sites, so nothing changes."
    zeroes = isinstance(intervention, Zero) or (isinstance(intervention, Scale) and intervention.factor == 0)
    if zeroes and (roles := sorted({site.role for site in sites if _deletes(live, site, sites)})):
        yield (
            f"Zeroing {', '.join(roles)} deletes the MLP (act(0) = 0, no bias): gate, up or down give the "
            f"same logits then, so this does not speak for one of them."
        )


def left_behind(base: Checkpoint, donor: Checkpoint) -> tuple[str, ...]:
    """What of a donor no weights carry over, in sentences; none where the two share too little to say."""
    try:
        return pair(base, donor).unlike
    except NothingToCompare:
        return ()


def _deletes(live: Checkpoint, site: Site, zeroed: Sites) -> bool:
    """Whether zeros at a site make its MLP add nothing but a bias of its last matrix."""
    if site.role not in MLP or site.param != "weight" or site != site.at():
        return False
    beside = [
        Site(site.tower, role, site.layer, site.stack, "weight", site.expert, site.label) for role in MLP
    ]
    biases = [
        Site(site.tower, role, site.layer, site.stack, "bias", site.expert, site.label) for role in MLP[:2]
    ]
    gated = all(one in live.storage for one in beside)
    biased = any(bias in live.storage and bias not in zeroed for bias in biases)
    return gated and not biased and _through_zero(sections(live.config, [site.tower])[site.tower])


def _through_zero(settings: Mapping[str, Any]) -> bool:
    stated = next((settings[key] for key in _ACTIVATIONS if key in settings), "")
    return isinstance(stated, str) and any(name in stated for name in _THROUGH_ZERO)
