"""From a canonical name to tower, layer and role: one table, and the few things only context can tell.

The table is ordered and the first match wins. A plain leaf table calls routers and attention gates
`gate_proj` and ungated MLPs gated, so `gated` looks at the siblings before a leaf becomes a gate.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Place(NamedTuple):
    """What a name says: tower, layer, the path below the layer, and the role."""

    tower: str
    layer: int | None
    local: str
    role: str


_TOWERS = (
    ("projector", r"(^|\.)(multi_modal_projector|mm_projector|merger|deepstack_merger_list|connector)\."),
    ("vision", r"(^|\.)(visual|vision_tower|vision_model|image_encoder)\."),
    ("audio", r"(^|\.)(audio_tower|audio_model|audio_encoder)\."),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|block|h|layer)\.(\d+)\.")

# (pattern of the path below the layer, role); `attn` and `mlp` in a pattern are what tells twins apart.
_ROLES = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"norm|layrnorm|(^|\.)ln_\w+$", "norm"),
        (r"(^|\.)(q|k)_norm$", "norm"),
        (r"(^|\.)lm_head$", "lm_head"),
        (r"(^|\.)embed_tokens$", "embed_tokens"),
        (r"(position_embeddings?|pos_embed|embed_positions)$", "pos_embed"),
        (r"(patch_embedding|patch_embed\.proj)$", "patch_embed"),
        (r"(class_embedding|cls_token|probe)$", "learned_token"),
        (r"att\w*\.(q|k|v)_proj$", r"\1_proj"),
        (r"att\w*\.(o_proj|out_proj|proj)$", "o_proj"),
        (r"att\w*\.(qkv|in_proj)$", "qkv_proj"),
        (r"(mlp|block_sparse_moe|moe)\.(gate|router)$", "router"),
        (r"shared_expert_gate$", "shared_expert_gate"),
        (r"(^|\.)(gate|up|down)_proj$", r"\2_proj"),
        (r"(^|\.)(fc1|linear_1|linear_fc1|mlp\.0)$", "fc1"),
        (r"(^|\.)(fc2|linear_2|linear_fc2|mlp\.2)$", "fc2"),
        (r"(^|\.)(linear|mm_input_projection_weight|multi_modal_projector)$", "proj"),
        (r"(^|\.)conv\d$", "conv"),
    )
)
_EXACT = {"q_norm": "q_norm", "k_norm": "k_norm"}
_UNGATED = {"up_proj": "fc1", "down_proj": "fc2"}


def place(name: str, names: Collection[str]) -> Place:
    """Say where the module `name` (no `.weight`) sits and what it does; `names` are all module names.

    A role that the table and the siblings can't establish is `other`, never a guess.
    """
    tower = next((tower for tower, pattern in _TOWERS if re.search(pattern, name + ".")), "language")
    # Merger lists and projector stacks carry list indices, which are no layers.
    found = None if tower == "projector" else _LAYER.search(name + ".")
    local = name[found.end() :] if found else name
    return Place(tower, int(found[1]) if found else None, local, _role(name, local, names))


def _role(name: str, local: str, names: Collection[str]) -> str:
    leaf = local.rpartition(".")[2]
    if leaf in _EXACT:
        return _EXACT[leaf]
    role = "other"
    for pattern, template in _ROLES:
        if match := pattern.search(local):
            role = match.expand(template)
            break
    if role in MLP and "att" in local.rpartition(".")[0]:
        return "attn_out_gate" if role == "gate_proj" else "other"
    if role in MLP and not _gated(name, names):
        # Stacked experts have no siblings to tell a gated MLP by, so their role stays open.
        return "other" if "experts" in local else _UNGATED.get(role, "other")
    return role


def _gated(name: str, names: Collection[str]) -> bool:
    parent = name.rpartition(".")[0]
    return f"{parent}.gate_proj" in names and f"{parent}.up_proj" in names
