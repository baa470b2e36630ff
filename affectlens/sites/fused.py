"""Split fused tensors: by shape if the shape decides, otherwise by a short table of model types.

If neither decides, the tensor stays whole: a wrong split would mix gate and up in every figure.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from affectlens.sites.site import Fused, Shape
from affectlens.sites.tower_configs import heads, number

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")


class Setting(NamedTuple):
    """The surroundings of a fused tensor: its model, and the shapes of its siblings by role."""

    model_type: str
    tower: str
    name: str  # the canonical name of the module
    stored: str  # the name of the tensor as it is stored
    beside: Mapping[str, Shape]  # weights by role
    config: Mapping[str, Any]  # the section of the config for this tower

    def number(self, *keys: str) -> int | None:
        """Return the first of these config entries that is a positive whole number."""
        return number(self.config, *keys)

    def head_dim(self, width: int | None) -> int | None:
        """Return the size of a head: as the config says, otherwise `width` over the number of heads."""
        stated = self.number("head_dim", "d_kv", "d_head")
        every = heads(self.config)[0]
        return stated or (width // every if every and width else None)


# (model type, end of the module's name) → the layout of q, k and v in one tensor. All others concatenate.
_QKV_LAYOUTS = tuple(
    (re.compile(kind), re.compile(name), layout)
    for kind, name, layout in (
        (r"gpt_neox.*|bloom|persimmon|fuyu|pythia", r"query_key_value", "per_head"),
        (r"minimax", r"self_attn\.qkv_proj", "per_head"),
        (r"deberta", r"in_proj", "per_head"),
        (r"falcon|RefinedWeb.*", r"query_key_value", "falcon"),
        (r"gpt_bigcode", r"c_attn", "bigcode"),
        (r"codegen", r"qkv_proj", "codegen"),
        (r"internlm2.*|internvl.*|internlm_?xcomposer.*", r"wqkv", "kv_group"),
        (r"qwen", r"resblocks\.\d+\.attn\.in_proj", "per_head"),
        (r"chatglm", r"query_key_value", "chatglm"),
        (r"qwen3_next", r"in_proj_qkvz", "qkvz"),
        (r"step3p7.*", r"in_proj_qkvz", "qkvz"),
    )
)


# Models whose first half is up. The code decides which half goes through the activation, not the name.
_UP_FIRST = tuple(
    (re.compile(kind), re.compile(name))
    for kind, name in (
        (r"phi4_multimodal.*|phi4mm", r"(?:audio|speech|encoders)\S*"),
        (r"gte|molmo\w*", r"\S*"),
        (r"aya_vision|cohere2_vision|moonshine\w*|clvp\w*", r"\S*"),
    )
)


# Models with the gate in even rows and up in odd rows.
_INTERLEAVED = tuple(
    (re.compile(kind), re.compile(name)) for kind, name in ((r"gpt_oss", r"experts"), (r"inkling\w*", r"w13"))
)


# Models whose first MLP matrix includes a gate although its name does not say so.
_GLU = re.compile(r"aya_vision|cohere2_vision|moonshine\w*|moshi\w*|kyutai\w*|dots3_note\w*|chatglm|clvp\w*")


def fused(role: str, shape: Shape, *, setting: Setting) -> Fused | None:
    """Return the slices of a fused parameter; None if it is not fused, or its layout is unknown."""
    if not shape:
        return None
    if role == "qkv_proj":
        return _qkv(shape, setting)
    if role == "kv_proj":
        return _kv(shape, setting)
    if role == "gate_up_proj":
        return _gate_up(shape, setting)
    if role == "q_b_proj" and setting.name.endswith("q_gate_proj"):
        names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        nope, rope, value = (setting.number(name) or 0 for name in names)
        times = heads(setting.config)[0]
        return _periodic(0, shape, ("q_b_proj", "attn_out_gate"), (nope + rope, value), times=times)
    if role == "q_proj":
        return _gated_query(shape, setting)
    if role == "kv_a_proj_with_mqa":
        return _latent(shape, setting)
    if role == "kv_b_proj":
        # The latent of MLA expands to the keys without position and the values, head by head.
        parts = setting.number("qk_nope_head_dim"), setting.number("v_head_dim")
        return _periodic(0, shape, ("k_nope", "v_proj"), parts, times=heads(setting.config)[0])
    return None


def glu_in_fc1(module: str, model_type: str) -> bool:
    """Return True if an fc1 twice as wide as its fc2 needs is known to be gate and up, in this order."""
    return module.endswith((".Wi", ".input_linear")) or bool(_GLU.fullmatch(model_type))


def _qkv(shape: Shape, setting: Setting) -> Fused | None:
    # The input of o_proj is as wide as the queries, so the rest of the tensor is keys and values.
    out = setting.beside.get("o_proj", ())
    conv1d = len(shape) == 2 and _is_transposed(shape, setting.beside.get("qkv_proj.bias"))
    dim = 1 if conv1d else 0
    width = (out[0] if conv1d else out[-1]) if len(out) == 2 else None
    if setting.name.endswith("gqkv_proj"):
        return _concat(dim, shape, ("attn_out_gate", *QKV), (shape[dim] // 4,) * 4)
    for kind, name, layout in _QKV_LAYOUTS:
        known = kind.fullmatch(setting.model_type) and (layout != "chatglm" or setting.tower == "language")
        if known and re.search(rf"(?:^|\.){name.pattern}$", setting.name):
            return _headwise(layout, dim, shape, setting, width)
    # Bailing concatenates although its module has a name that other models interleave.
    by_turns = setting.model_type.startswith("bailing")
    if setting.name.endswith(("query_key_value", "wqkv")) and setting.tower == "language" and not by_turns:
        return None  # some models interleave these by head, some concatenate them: the name does not tell
    return _in_turn(dim, shape, setting, width)


def _kv(shape: Shape, setting: Setting) -> Fused | None:
    """Split keys and values, unless one latent serves as both: DeepSeek-V4 has a `kv_proj` of that kind."""
    if (
        not setting.name.endswith((".to_kv", ".kv", ".kv_linear", ".c_attn"))
        and setting.model_type != "jetmoe"
    ):
        return None
    conv1d = len(shape) == 2 and _is_transposed(shape, setting.beside.get("kv_proj.bias"))
    dim = 1 if conv1d else 0
    return _concat(dim, shape, ("k_proj", "v_proj"), (shape[dim] // 2,) * 2)


def _in_turn(dim: int, shape: Shape, setting: Setting, width: int | None) -> Fused | None:
    total = shape[dim]
    values = setting.beside.get("attn_out_gate", ())
    if setting.name.endswith("in_proj_qkv") and values:  # linear attention: v is as wide as its output gate
        return _concat(dim, shape, QKV, ((total - values[0]) // 2,) * 2 + (values[0],))
    if width and width < total and not (total - width) % 2:
        return _concat(dim, shape, QKV, (width, (total - width) // 2, (total - width) // 2))
    # Without o_proj, three equal parts are certain only in vision towers and under these names.
    packed = setting.tower == "vision" or setting.name.endswith(("in_proj", ".qkv", "att_proj", "W_pack"))
    if packed and not total % 3:
        return _concat(dim, shape, QKV, (total // 3,) * 3)
    return None


def _headwise(layout: str, dim: int, shape: Shape, setting: Setting, width: int | None) -> Fused | None:
    every, groups = heads(setting.config)
    size = setting.head_dim(width)
    if not every or not size:
        return None
    if layout == "chatglm" and setting.config.get("multi_query_attention"):
        return _in_turn(dim, shape, setting, width)
    if layout == "falcon":
        # 40B groups each k and v with its queries, 7B has one k and v after all queries, 1B is per head.
        if setting.config.get("new_decoder_architecture") or setting.number("n_head_kv"):
            groups, layout = setting.number("num_kv_heads", "n_head_kv") or every, "kv_group"
        else:
            layout = "concat" if setting.config.get("multi_query", True) else "per_head"
            size = shape[dim] // (every + 2) if layout == "concat" else size
    if layout == "bigcode":
        layout = "concat" if setting.config.get("multi_query", True) else "per_head"
    if layout == "concat":
        return _concat(dim, shape, QKV, (every * size, size, size))
    if layout == "codegen":  # trained on four chips: four chunks, each with q, v, k
        return _periodic(dim, shape, ("q_proj", "v_proj", "k_proj"), (every * size // 4,) * 3, times=4)
    if layout == "kv_group":
        if not groups or every % groups:
            return None
        return _periodic(dim, shape, QKV, (every // groups * size, size, size), times=groups)
    if layout == "qkvz":
        return _linear_attention(dim, shape, setting)
    return _periodic(dim, shape, QKV, (size, size, size), times=every)


def _linear_attention(dim: int, shape: Shape, setting: Setting) -> Fused | None:
    keys, values = setting.number("linear_num_key_heads"), setting.number("linear_num_value_heads")
    k, v = setting.number("linear_key_head_dim"), setting.number("linear_value_head_dim")
    if not (keys and values and k and v):
        return None
    wide = values // keys * v
    return _periodic(dim, shape, (*QKV, "attn_out_gate"), (k, k, wide, wide), times=keys)


def _gate_up(shape: Shape, setting: Setting) -> Fused | None:
    dim = _gate_up_dim(shape, setting.beside.get("down_proj", ()))
    if dim is None or shape[dim] % 2:
        return None
    roles = GATE_UP
    for kind, name in _UP_FIRST:
        if kind.fullmatch(setting.model_type) and re.search(name.pattern, setting.name):
            roles = ("up_proj", "gate_proj")
    if setting.name.endswith(("up_gate_proj", "ff_proj")) and roles == GATE_UP:
        return None  # the name suggests one order, most code uses the other
    if any(kind.fullmatch(setting.model_type) and name.search(setting.stored) for kind, name in _INTERLEAVED):
        slices = (("gate_proj", 0, 1), ("up_proj", 1, 2))
        return Fused(dim, shape[dim], "interleaved", 2, slices)
    half = shape[dim] // 2
    return _concat(dim, shape, roles, (half, half))


def _gate_up_dim(shape: Shape, down: Shape) -> int | None:
    """Find the dimension along which gate and up are fused: twice as long as the input of down."""
    if len(down) != len(shape) or len(down) < 2:
        # A bias, or a shard without its down: only a vector or a plain matrix is unambiguous.
        return {1: 0, 2: 0}.get(len(shape)) if not down or len(shape) == 1 else len(shape) - 1
    if shape[-2] == 2 * down[-1]:
        return len(shape) - 2
    return len(shape) - 1 if shape[-1] == 2 * down[-2] else None


def _gated_query(shape: Shape, setting: Setting) -> Fused | None:
    out, norm = setting.beside.get("o_proj", ()), setting.beside.get("q_norm", ())
    # Only a query with an output gate for each head is twice as wide as the input of o_proj.
    if len(out) == 2 and len(norm) == 1 and shape[0] == 2 * out[1] and "kv_b_proj" not in setting.beside:
        return _periodic(0, shape, ("q_proj", "attn_out_gate"), (norm[0], norm[0]))
    return None


def _latent(shape: Shape, setting: Setting) -> Fused | None:
    inner = setting.beside.get("kv_b_proj", ())
    rank = inner[1] if len(inner) == 2 else setting.number("kv_lora_rank")
    if not rank or rank >= shape[0]:
        return None
    return _concat(0, shape, ("kv_latent", "k_rope"), (rank, shape[0] - rank))


def _is_transposed(shape: Shape, bias: Shape | None) -> bool:
    # GPT-2's Conv1D stores (in, out): its bias is as long as the second dimension.
    return shape[0] != shape[1] and (bias == (shape[1],) or (bias is None and shape[1] == 3 * shape[0]))


def _concat(dim: int, shape: Shape, roles: tuple[str, ...], sizes: tuple[int, ...]) -> Fused | None:
    found = _periodic(dim, shape, roles, sizes)
    return found if found and found.period == shape[dim] else None


def _periodic(
    dim: int, shape: Shape, roles: tuple[str, ...], sizes: tuple[int | None, ...], *, times: int | None = None
) -> Fused | None:
    """Return slices that recur every period; None if the shape does not hold exactly `times` periods."""
    slices, start = [], 0
    for role, size in zip(roles, sizes, strict=True):
        if not size:
            return None
        slices.append((role, start, start + size))
        start += size
    if shape[dim] % start or (times is not None and shape[dim] != times * start):
        return None
    layout = "concat" if start == shape[dim] else "per_head"
    return Fused(dim, shape[dim], layout, start, tuple(slices))
