"""Whether zeros at a site delete a whole MLP, so that nothing is said of this matrix in particular."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from affectlens.checkpoints import Checkpoint
from affectlens.lens import Lens, module_name
from affectlens.sites import Site, Sites

_PARTS = ("gate_proj", "up_proj", "down_proj")
_MLP = ("tower", "stack", "layer", "expert", "label")  # what they share
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "hidden_act", "activation_func")


def deleted_mlps(lens: Lens, sites: Sites) -> Sequence[str]:
    """Say so where zeroing gates, ups or downs, or neurons of them, deletes what the MLP makes of them."""
    return deletions(lens.checkpoint, sites, starts_at_zero=lambda site: _starts_at_zero(lens, site))


def deletions(live: Checkpoint, sites: Sites, *, starts_at_zero: Callable[[Site], bool]) -> Sequence[str]:
    """The same of a checkpoint, given whether the activation beside a matrix maps zero to zero.

    act(gate)·up is zero where gate is, if act(0) = 0, or where up is, unless a bias is added. What can't be
    established is not said.
    """
    zeroed = frozenset(site for site in sites if site.role in _PARTS)
    mlps = Sites(site for site in live.sites if site.role in _PARTS).by(*_MLP)
    found = [
        site
        for site in zeroed
        if site.param == "weight" and _deletes(site, mlps[_key(site)], zeroed) and starts_at_zero(site)
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
