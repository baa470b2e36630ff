"""Find the roles of MLP matrices, which depend on the other matrices of the MLP.

`w1` is the gate if `w3` is beside it, the first matrix of a plain MLP if only `w2` is, and up beside Qwen-1's
`c_proj`. A matrix with an ambiguous name and no siblings has no role.
"""

import re

from affectlens.sites.module import Module, bare, vector
from affectlens.sites.names import words
from affectlens.sites.site import Shape

MLP = ("gate_proj", "up_proj", "down_proj")
FUSED_GATE_UP = words(
    r"""
    gate_up_proj gate_up up_gate_proj gate_and_up_projs (?:shared_)?w13_weight w13_dn w13 w12 weights_in
    ff_proj
    """
)

# (gate, up, down)
_GATED = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_proj", "up_proj", "c_proj"),
    ("gate_proj", "dense_h_to_4h", "dense_4h_to_h"),
    ("w1", "w3", "w2"),
    ("w2", "w1", "c_proj"),  # Qwen-1: silu(w2(x)) · w1(x)
    ("w1", "v1", "w2"),
    ("fc1", "fc3", "fc2"),
    ("wi_0", "wi_1", "wo"),
    ("w_0", "w_1", "w_out"),
    ("c_fc_0", "c_fc_1", "c_proj"),
    ("proj_up_gate", "proj_up", "proj_down"),
    ("fc12", "fc11", "fc2"),
    ("gate", "up", "down"),
    ("linear_gate", "linear_up", "linear_down"),
)
_DOWN = re.compile(
    r"down_proj|Wo|wo|output_linear|(?:shared_)?w2_weight|weights_out|down_projs|w2_md|w[23]|fc2|ff_out"
)

# (in, out) of plain MLPs: names that are clear even alone, then names that are clear only as a pair.
_PLAIN = (
    ("fc1", "fc2"), ("fc_1", "fc_2"), ("lin1", "lin2"), ("linear_fc1", "linear_fc2"), ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"), ("fc_in", "fc_out"), ("intermediate_dense", "output_dense"),
    ("ffw_layer_1", "ffw_layer_2"), ("pwconv1", "pwconv2"), ("intermediate.dense", "output.dense"),
    ("intermediate_query.dense", "output_query.dense"), ("layout_intermediate.dense", "layout_output.dense"),
    ("lang_inter.dense", "lang_output.dense"), ("visn_inter.dense", "visn_output.dense"),
)  # fmt: skip
_PAIRED = (
    ("up_proj", "down_proj"), ("linear_1", "linear_2"), ("linear1", "linear2"), ("wi", "wo"), ("Wi", "Wo"),
    ("proj_in", "proj_out"), ("in_proj", "out_proj"), ("layer_1", "layer_2"), ("dense1", "dense2"),
    ("dense_1", "dense_2"), ("w_in", "w_out"), ("w1", "w2"), ("ffn", "ffn_output"),
    ("linear_in", "linear_out"), ("intermediate", "output"), ("dense_in", "dense_out"), ("key", "value"),
    ("input_linear", "output_linear"),
    ("pointwise_conv1", "pointwise_conv2"), ("ff0", "ff1"), ("conv1", "conv2"), ("fc", "c_proj"),
    ("hidden_layer", "output_layer"), ("merge_linear_1", "merge_linear_2"), ("proj_up", "proj_down"),
)  # fmt: skip
_IN_AN_MLP = re.compile(r"(?:\w+_)?(?:mlp|feed_forward|ffn|experts?|moe)\d*|\d+")


def in_mlp(module: Module) -> str | None:
    """Return the role of an MLP matrix; None if the module is not known to be one."""
    return _gated(module) or _plain(module) or _numbered(module)


def _gated(module: Module) -> str | None:
    # Gated attentions have a gate_proj too.
    if re.search(r"(?:^|[._])att", module.parents) and "mlp" not in module.parents:
        return None
    leaf = module.leaf.removesuffix("_bias") if bare(module) else module.leaf
    # A shard may hold the family's other matrices elsewhere, so their shapes may be unknown.
    has = {**module.siblings, leaf: module.params.get("weight", module.params.get("param", ()))}
    for family in _GATED:
        if leaf in family and has.keys() >= {*family[:2]} and (family[2] in has or family[2] != "c_proj"):
            gate, up, down = (has.get(name, ()) for name in family)
            if _fits(gate, up, down) or (family[0] == "gate_proj" and _leads(has[leaf], gate, up, down)):
                return MLP[family.index(leaf)]
    # A file of gate-only tuning holds no up_proj.
    alone = leaf == "gate_proj" and has.keys() <= {"gate_proj", "down_proj"}
    if alone and _IN_AN_MLP.fullmatch(module.parents.rpartition(".")[2]) and "fusion" not in module.parents:
        return "gate_proj"
    if _DOWN.fullmatch(leaf) and any(re.fullmatch(FUSED_GATE_UP, name) for name in has):
        return "down_proj"
    return None


def _fits(gate: Shape, up: Shape, down: Shape) -> bool:
    """Check that gate and up have one shape and down leads back: a classifier head may have such names."""
    if len(gate) < 2 or len(up) < 2:
        return True  # biases and bare containers have no shapes to check
    if gate != up:
        return False
    return len(down) != len(gate) or gate[-2] in down[-2:] or gate[-1] in down[-2:]


def _leads(own: Shape, gate: Shape, up: Shape, down: Shape) -> bool:
    """Check one matrix if the shapes of the three do not all fit: down must lead back from this one."""
    if own == down:
        return down[::-1] in (gate, up)
    return len(own) == len(down) == 2 and own == down[::-1]


def _plain(module: Module) -> str | None:
    has = module.siblings.keys() | {module.leaf}
    for name in (".".join(module.local.split(".")[-2:]), module.leaf):
        for first, last in (*_PLAIN, *_PAIRED):
            if name in (first, last) and ((first, last) in _PLAIN or {first, last} <= has):
                return "fc1" if name == first else "fc2"
    return None


def _numbered(module: Module) -> str | None:
    # `mlp.0` and `mlp.2` are the matrices of a sequence; a norm in it has a vector, an activation nothing.
    if "adapter" in module.parents or not module.leaf.isdecimal() or vector(module):
        return None
    matrices = sorted(int(n) for n, shape in module.siblings.items() if n.isdecimal() and len(shape) >= 2)
    if len(matrices) != 2:
        return None
    return ("fc1", "fc2")[matrices.index(int(module.leaf))] if int(module.leaf) in matrices else None
