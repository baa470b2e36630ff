"""Whether zeros at a site delete a whole MLP, so that nothing is said of this matrix in particular."""

from collections.abc import Sequence

import torch
from torch import nn

from affectlens.lens import Lens, module_name
from affectlens.sites import Site, Sites

_PARTS = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "hidden_act", "activation_func")


def deleted_mlps(lens: Lens, sites: Sites) -> Sequence[str]:
    """Say so where zeroing whole gates, ups or downs deletes the MLP.

    act(gate)·up is zero where gate is, if act(0) = 0, or where up is, unless a bias is added. What can't be
    established is not said.
    """
    zeroed = [site for site in sites if site.role in _PARTS and site.param == "weight" and site == site.at()]
    found = [site for site in zeroed if _deletes(lens, site, set(zeroed))]
    if not found:
        return ()
    roles = ", ".join(sorted({site.role for site in found}))
    words = (
        f"Zeroing {roles} deletes the MLP (act(0) = 0, no bias): gate, up and down give the same logits then"
    )
    return (f"{words}, so this does not speak for one of them.",)


def _deletes(lens: Lens, site: Site, zeroed: set[Site]) -> bool:
    family = [
        one
        for one in lens.sites
        if one.role in _PARTS
        and (one.tower, one.stack, one.layer, one.expert, one.label)
        == (site.tower, site.stack, site.layer, site.expert, site.label)
    ]
    matrices = [one for one in family if one.param == "weight"]
    if zeroed.issuperset(matrices):
        return False  # whoever zeroes all three means the MLP
    roles = {one.role for one in matrices}
    biased = {one.role for one in family if one.param == "bias"}
    return roles == set(_PARTS) and not biased & {"gate_proj", "up_proj"} and _starts_at_zero(lens, site)


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
