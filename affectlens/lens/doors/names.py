"""Names: what TransformerLens calls a point, and which point one of its names is.

    language.12.gate_proj@pre_activation ⟷ blocks.12.mlp.hook_pre

Held to by values on live models, not by how the names sound: TransformerLens calls the router of a mixture
of experts `mlp.gate`, and there `mlp.hook_pre` is what goes into the mixture. Points of experts, of norms in
a layer, and of towers that see and hear have no name here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from affectlens.errors import LensError, near, quoted
from affectlens.sites import ATTENTION, MLP, Point, Site

_UNGATED = ("fc1", "fc2")
# (role, kind) → the end of the hook's name, in `blocks.L`. The first of those with one name is what it means.
_IN_LAYERS: Mapping[tuple[str, str], str] = {
    ("gate_proj", "pre_activation"): "mlp.hook_pre",
    ("gate_proj", "output"): "mlp.hook_pre",
    ("up_proj", "output"): "mlp.hook_pre_linear",
    ("down_proj", "gated"): "mlp.hook_post",
    ("down_proj", "input"): "mlp.hook_post",
    ("down_proj", "output"): "mlp.out.hook_out",
    ("gate_proj", "input"): "mlp.gate.hook_in",
    ("up_proj", "input"): "mlp.in.hook_in",
    ("q_proj", "output"): "attn.hook_q",
    ("k_proj", "output"): "attn.hook_k",
    ("v_proj", "output"): "attn.hook_v",
    ("o_proj", "heads"): "attn.hook_z",
    ("o_proj", "input"): "attn.hook_z",
    ("o_proj", "output"): "attn.o.hook_out",
    ("o_proj", "residual"): "hook_resid_post",
    **{(role, "pre_activation"): "mlp.hook_pre" for role in ("up_proj", "down_proj")},
    **{(role, "gated"): "mlp.hook_post" for role in ("gate_proj", "up_proj")},
    **{(role, "heads"): "attn.hook_z" for role in ATTENTION},
    **{(role, "residual"): "hook_resid_post" for role in (*MLP, *ATTENTION, *_UNGATED, "norm")},
    # An MLP without a gate, where TransformerLens means another module by the same name.
    ("fc1", "output"): "mlp.hook_pre",
    **{(role, "pre_activation"): "mlp.hook_pre" for role in _UNGATED},
    **{(role, "gated"): "mlp.hook_post" for role in _UNGATED},
    ("fc1", "input"): "mlp.in.hook_in",
    ("fc2", "input"): "mlp.hook_post",
    ("fc2", "output"): "mlp.out.hook_out",
}
_AROUND: Mapping[tuple[str, str], str] = {
    ("embed_tokens", "output"): "embed.hook_out",
    ("lm_head", "input"): "unembed.hook_in",
    ("lm_head", "output"): "unembed.hook_out",
    ("norm", "input"): "ln_final.hook_in",
    ("norm", "output"): "ln_final.hook_out",
}
_FINAL = ("", "norm", "ln_f", "final_layernorm", "final_layer_norm")  # other norms are around embeddings
_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


def hook_name(point: Point) -> str:
    """The name of the hook where TransformerLens sees a point. Raises `LensError` where it has none.

    A head or neuron is among the features of the whole: `hook_z` is (batch, position, head, feature).

    >>> hook_name(Point(Site("language", "gate_proj", layer=12), "pre_activation"))
    'blocks.12.mlp.hook_pre'
    """
    site = point.site
    if site.tower != "language":
        raise LensError(
            f"{point!r}: TransformerLens names what is in the language tower, not in {site.tower}"
        )
    if site.expert is not None or "shared_expert" in site.label:
        raise LensError(f"{point!r}: TransformerLens has no hook inside experts")
    if site.stack is not None:
        raise LensError(
            f"{point!r}: its hook depends on the architecture where there are two stacks of layers"
        )
    table = _AROUND if site.layer is None else _IN_LAYERS
    name = table.get((site.role, point.kind))
    if name is None or (name[:8] == "ln_final" and site.label.rpartition(".")[2] not in _FINAL):
        there = ", ".join(sorted({f"{role}@{kind}" for role, kind in table}))
        raise LensError(f"{point!r} has no name in TransformerLens. Named are: {there}")
    return name if site.layer is None else f"blocks.{site.layer}.{name}"


def point_of(name: str, sites: Iterable[Site] | None = None) -> Point:
    """The point, of all positions, that a hook is about; of a model's own sites, where they are given.

    Without them it is taken to be that of a gated language model. Raises `LensError` for a name that is no
    point of ours.

    >>> point_of("blocks.12.mlp.hook_post")
    language.12.down_proj@gated
    """
    inside = _LAYER.fullmatch(name)
    table, end = (_IN_LAYERS, inside[2]) if inside else (_AROUND, name)
    layer = int(inside[1]) if inside else None
    meant = [
        Point(Site("language", role, layer=layer), kind)
        for (role, kind), known in table.items()
        if known == end
    ]
    if sites is not None:
        there = {
            (s.role, s.layer): s for s in sites if (s.tower, s.stack, s.param) == ("language", None, "weight")
        }
        meant = [replace(p, site=there[key]) for p in meant if (key := (p.site.role, p.site.layer)) in there]
        meant = [p for p in meant if p.site.expert is None]
    if not meant:
        raise LensError(
            f"{quoted(name)} is no point of ours. Hooks that are: {near(end, dict.fromkeys(table.values()))}"
        )
    return meant[0]
