"""What a module does: one ordered table over its path, and what only its surroundings can tell.

The first row that matches wins. A name alone calls routers and attention gates `gate_proj` and plain
MLPs gated, so rows ask for context (inside an attention, a bare parameter, a vector), and the
matrices of an MLP are recognised as families: `w1` is a gate where `w3` is its sibling, half of a
plain MLP where only `w2` is, and up where Qwen-1's `c_proj` completes it.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

Shape = tuple[int, ...]
MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Module(NamedTuple):
    """A module as its names and shapes show it."""

    tower: str
    layered: bool
    local: str  # the path below the layer
    params: Mapping[str, Shape]  # by `weight`, `bias` or `param`
    siblings: frozenset[str]  # the names beside it, over all layers

    @property
    def leaf(self) -> str:
        """The module's own name."""
        return self.local.rpartition(".")[2]

    @property
    def parents(self) -> str:
        """The path that leads to it, below the layer."""
        return self.local.rpartition(".")[0]

    @property
    def ndim(self) -> int:
        """The dimensions of its weight."""
        return len(self.params.get("weight", self.params.get("param", (0,))))


# Names of the attention projections, as transformers and remote code have them.
_Q = r"(?:q|query|to_q|[wW]q|linear_q|q_lin|q_head|query_net|query_proj|projection_query|to_query|project_q|query_layer)"
_K = r"(?:k|key|to_k|[wW]k|linear_k|k_lin|k_head|key_net|key_proj|projection_key|to_key|project_k|key_layer)"
_V = r"(?:v|value|to_v|[wW]v|linear_v|v_lin|v_head|value_net|value_proj|projection_value|project_v|value_layer)"
_O = (
    r"(?:o|o_proj|out|out_proj|proj|proj_out|dense|output|output\.dense|to_out|to_out\.0|wo|Wo|c_proj|out_lin"
    r"|linear_out|projection(?:_layer)?|output_proj|out_projection|resid_proj|layout_output\.dense|final|post(?:_proj)?"
    r"|o_attn|output_linear|attention_out)"
)
_FUSED_QKV = (
    r"(?:qkv|qkv_proj|in_proj|query_key_value|c_attn|att_proj|[Ww]qkv|to_qkv|in_proj_qkv|in_proj_qkvz|w_qkv)"
)
_FUSED_KV = r"(?:kv|to_kv|kv_proj|kv_linear|keys_values)"
_FUSED_GATE_UP = r"(?:gate_up_proj|gate_up|up_gate_proj|gate_and_up_projs|(?:shared_)?w13_weight|w13_dn|w13|w12|weights_in)"
_NORM = (
    r"(?:\w*norm(?:s|_?\d+|_?[a-z]{1,4}|alization)?|\w*_norm_\w+|\w*LayerNorm\w*|\w*layernorm\w*|\w*layrnorm"
    r"|\w*layer_norm\w*|ln(?:_?\w{1,6})?|\w+_ln|bn\d*|\w*rms_?norm\w*|norm_\w+)"
)
_POSITION = (
    r"(?:\w*pos(?:ition(?:al)?)?_?embed(?:ding)?s?\w*|embed_positions|wpe|pos_emb|relative_attention_bias"
    r"|relative_position_bias_table|rel_pos_\w+|\w*distance_embedding|rel_attn_embed|pos_bias_[uv]|bias_[uv]"
    r"|emb_rel_[kv]|linear_pos|relative_k_proj|pos_proj|position_embedding_table|\w*position_embeddings?\w*"
    r"|positional_encoding\w*|r_[rsw]_bias|r_kernel|positions_embed|(?:row|column|tile)_embedd(?:ing|er)s?|rel_embeddings"
    r"|\w*tile_positional_embedding\.embedding|embed_positions\.\w+)"
)


def _attention(module: Module) -> bool:
    if re.search(
        r"(?i)att(?:n|ention)?s?(?:_|\.|\d|$)|selfattention|decattention|mha\b|xattn", module.parents
    ):
        return True
    # An attention whose name does not say so still has its q and its k.
    has = module.siblings
    return any(re.fullmatch(_Q, n) for n in has) and any(re.fullmatch(_K, n) for n in has)


def _bare(module: Module) -> bool:
    return "param" in module.params


def _vector(module: Module) -> bool:
    return len(module.params.get("weight", ())) == 1


def _state_space(module: Module) -> bool:
    return "A_log" in module.siblings or "dt_proj" in module.siblings or "dt_bias" in module.siblings


def _convolution(module: Module) -> bool:
    return module.ndim >= 3 and "experts" not in module.local


def _outside_layers(module: Module) -> bool:
    return not module.layered


def _sees_or_hears(module: Module) -> bool:
    return module.tower in ("vision", "audio")


def _rwkv(module: Module) -> bool:
    return "receptance" in module.siblings


def _both(*needs: Callable[[Module], bool]) -> Callable[[Module], bool]:
    return lambda module: all(need(module) for need in needs)


# (role, the end of the path, what else must hold)
_TABLE: tuple[tuple[str, re.Pattern[str], Callable[[Module], bool] | None], ...] = tuple(
    (role, re.compile(rf"(?:^|\.){pattern}$"), need)
    for role, pattern, need in (
        ("norm_stat", r"(?:running_mean|running_var|num_batches_tracked)", _bare),
        ("attn_sinks", r"sinks?", _bare),
        ("ssm_A", r"A_log", None),
        ("ssm_D", r"D", _bare),
        ("ssm_dt_bias", r"dt_bias", _bare),
        ("ssm_conv", r"(?:conv1d|[qkv]_conv1d)", _both(_state_space, _convolution)),
        ("ssm_dt_proj", r"dt_proj(?:_weight|_bias)?", None),
        ("ssm_x_proj", r"x_proj(?:_weight)?", _state_space),
        ("q_norm", r"(?:q_norm|q_layernorm|query_layernorm|q_ln|norm_q|q_a_layernorm|q_a_norm)", None),
        ("k_norm", r"(?:k_norm|k_layernorm|key_layernorm|k_ln|norm_k|kv_a_layernorm|kv_a_norm|kv_norm)", None),
        ("router_bias", r"(?:e_score_correction_bias|expert_bias|router_bias)", None),
        ("router", r"(?:router|gate|wg|router\.(?:layer|classifier|gate|weight)|gate\.wg|gatenet(?:\.\w+)*|gate_network)",
         lambda m: not _bare(m) and (_experts_near(m) or "router" in m.local or "gatenet" in m.local)),
        ("router", r"(?:router|gate_weight)", None),
        ("shared_expert_gate", r"shared_experts?_gate", None),
        ("gate_scalar", r"\w*residual_gate\.gate", None),
        ("attn_out_gate", r"(?:gate_proj|g_proj|gate|in_proj_z|linear_gate|g_[ab]_proj|output_gate|out_gate|head_gate)",
         _both(_attention, lambda m: "compressor" not in m.parents)),
        ("other", r"compressor\.\S+", lambda m: m.ndim == 2),
        ("time_mix", r"time_(?:mix_\w+|decay|first|maa_\w+|faaaa)", None),
        ("receptance", r"receptance", None),
        ("norm", r"\w*norm\.(?:gamma|beta)", None),
        ("scale", r"(?:lambda_?\d*|gamma(?:_\d)?|\w*layer_?scale\w*|\w+_gamma|ls\d?(?:\.\w+)?|scale|scaling|alpha|beta"
                  r"|logit_(?:scale|bias)|temperature|global_scale|per_dim_scale|layer_scalar|\w+_scale)", _bare),
        ("gate_scalar", r"(?:gate_attn|gate_ffn|gate_ffw|gate_attention|gate|\w*_gate|attn_gate|ffn_gate|alpha_\w+)", _bare),
        ("type_embed", r"(?:\w*token_type_embeddings?(?:_\d+)?|type_embeddings?|segment_emb(?:eddings?)?|seg_embed)", None),
        ("pos_embed", _POSITION, lambda m: not _vector(m) and not _convolution_weight(m)),
        ("norm", _NORM, lambda m: m.ndim <= 1 or _bare(m)),
        ("lm_head", r"(?:lm_head|embed_out|proj_out|lm_heads\.\d+|output_projection|cls\.predictions|predictions\.decoder"
                    r"|predictions|unembed|pred_layer\.proj|lm_head\.decoder|logits_dense|lm_loss|generator_lm_head|ctc_head)",
         lambda m: not m.layered and not _attention(m) and m.tower not in ("vision", "projector") or m.leaf == "lm_head"),
        ("embed_tokens", r"wte\.(?:new_)?embedding", None),
        ("head_dense", r"(?:predictions\.transform\.dense|(?:lm_head|predictions|generator_predictions|classifier|pooler)\.dense)", None),
        ("embed_tokens", r"(?:wte|word_embeddings?|\w*tok(?:en)?_embeddings?|embed_in|shared|embeddings|word_embedding|embed"
                         r"|\w*embed_tokens\w*(?:\.\d+)?|embed_\w*tokens|input_embeds_layers?(?:\.\d+)?|input_embedding|tokens_embed"
                         r"|embedding|transformer\.w|generation_embeddings|codec_embed)",
         lambda m: m.ndim == 2 and not m.layered and not _bare(m) and m.tower not in ("vision", "projector", "vq")),
        ("learned_token", r"(?:cls_token|class_embedding|\w*cls_\w*token|register_tokens|mask_token|distillation_token|probe|query_tokens"
                          r"|latent_query|latents?|query|queries|image_newline|masked_spec_embed|query_embed\w*|class_pos_emb"
                          r"|\w+_token|view_seperator|\w+_tokens?|audio_bos_eos_token)", lambda m: _bare(m) or m.leaf.startswith("audio_bos")),
        ("patch_embed", r"(?:patch_embed(?:ding|dings|der)?(?:\.\w+)*|patch_conv|patch_projection|patchify|embeddings\.projection)",
         _outside_layers),
        ("conv_pw", r"(?:pointwise_conv\d?|pw_conv\w*|pwconv\d?)", lambda m: m.ndim >= 3),
        ("q_proj", r"experts\.input_linear", _attention),  # a mixture of attentions
        ("o_proj", r"experts\.output_linear", _attention),
        ("gate_up_proj", r"input_linear", lambda m: m.ndim == 3),
        ("down_proj", r"output_linear", lambda m: m.ndim == 3),
        ("conv", r"\S+", lambda m: _convolution(m) and not _attention_projection(m)),
        ("kv_a_proj_with_mqa", r"(?:kv_a_proj_with_mqa|wkv_a_with_mqa|kv_a_proj)", None),
        ("kv_b_proj", r"(?:kv_b_proj|wkv_b)", None),
        ("q_a_proj", r"(?:q_a_proj|wq_a)", None),
        ("q_b_proj", r"(?:q_b_proj|wq_b)", None),
        ("other", r"indexer\.\S+", None),
        ("q_proj", r"q_proj", None),
        ("k_proj", r"k_proj", None),
        ("v_proj", r"v_proj", None),
        ("qkv_proj", r"(?:g?qkv_proj|query_key_value|[Ww]qkv|c_attn|att_proj|in_proj_qkvz?)", None),
        ("qkv_proj", _FUSED_QKV, _attention),
        ("kv_proj", _FUSED_KV, _attention),
        ("ssm_in_proj", r"(?:in_proj|in_proj_[ab]|in_proj_ba|b_proj|f_[ab]_proj)", _state_space),
        ("ssm_out_proj", r"out_proj", lambda m: _state_space(m) and not _attention(m)),
        ("q_proj", _Q, _both(_attention, lambda m: not _bare(m))),
        ("k_proj", _K, _attention),
        ("v_proj", _V, _attention),
        ("o_proj", r"o_proj", None),
        ("o_proj", _O, _attention),
        ("k_proj", r"key", _rwkv),
        ("v_proj", r"value", _rwkv),
        ("o_proj", r"output", _rwkv),
        ("gate_up_proj", rf"(?:{_FUSED_GATE_UP}|ff_proj)(?:_bias)?", None),
    )
)  # fmt: skip


def _convolution_weight(module: Module) -> bool:
    return len(module.params.get("weight", ())) >= 3


def _attention_projection(module: Module) -> bool:
    return bool(re.fullmatch(rf"{_Q}|{_K}|{_V}|[qkv]_proj|out_proj|o_proj", module.leaf)) and _attention(
        module
    )


def _experts_near(module: Module) -> bool:
    moe = r"experts|mlp|moe|feed_forward|ffn|mixer|block_sparse_moe"
    return "experts" in module.siblings or bool(re.search(rf"(?:^|\.)(?:\w*_)?(?:{moe})$", module.parents))


# The matrices of a gated MLP as (gate, up, down), of a plain one as (in, out): a role needs its family.
_GATED = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_proj", "up_proj", "c_proj"),
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
_PLAIN = (
    ("fc1", "fc2"), ("fc_1", "fc_2"), ("linear_1", "linear_2"), ("linear1", "linear2"), ("lin1", "lin2"),
    ("linear_fc1", "linear_fc2"), ("dense_h_to_4h", "dense_4h_to_h"), ("c_fc", "c_proj"), ("fc_in", "fc_out"),
    ("intermediate.dense", "output.dense"), ("intermediate_dense", "output_dense"), ("wi", "wo"), ("Wi", "Wo"),
    ("up_proj", "down_proj"), ("proj_in", "proj_out"), ("in_proj", "out_proj"), ("layer_1", "layer_2"),
    ("ffw_layer_1", "ffw_layer_2"), ("dense1", "dense2"), ("dense_1", "dense_2"), ("w_in", "w_out"), ("w1", "w2"),
    ("ffn", "ffn_output"), ("intermediate", "output"), ("dense_in", "dense_out"), ("pwconv1", "pwconv2"),
    ("key", "value"), ("input_linear", "output_linear"), ("pointwise_conv1", "pointwise_conv2"),
    ("intermediate_query.dense", "output_query.dense"), ("layout_intermediate.dense", "layout_output.dense"),
    ("ff0", "ff1"), ("lang_inter.dense", "lang_output.dense"), ("visn_inter.dense", "visn_output.dense"),
    ("conv1", "conv2"), ("dense.dense", "output.dense"), ("hidden_layer", "output_layer"),
)  # fmt: skip
_MLP_PARENT = re.compile(
    r"(?:^|[._])(?:\w*mlp\w*|ffn?\d?|feed_?forward\w*|experts?|shared_experts?|moe|mixer|dense\w*)(?:\.|$)",
    re.I,
)


def role(module: Module) -> str:
    """Name the role of a module; `other` where names and surroundings establish none."""
    for found, pattern, need in _TABLE:
        if pattern.search(module.local) and (need is None or need(module)):
            return found
    return _in_mlp(module) or _numbered(module) or _by_shape(module)


def _in_mlp(module: Module) -> str | None:
    leaf = module.leaf.removesuffix("_bias") if _bare(module) else module.leaf
    has = module.siblings | {leaf}
    for family in _GATED:
        if leaf in family and {*family[:2]} <= has and (family[2] in has or family[2] != "c_proj"):
            return MLP[family.index(leaf)]
    if leaf == "gate_proj" and _MLP_PARENT.search(module.parents + "."):
        return "gate_proj"
    if leaf in (
        "down_proj",
        "Wo",
        "wo",
        "output_linear",
        "w2",
        "fc2",
        "w2_weight",
        "shared_w2_weight",
        "weights_out",
        "down_projs",
        "w2_md",
        "w3",
        "ff_out",
    ) and any(re.fullmatch(rf"{_FUSED_GATE_UP}|ff_proj", n) for n in has):
        return "down_proj"
    two = ".".join(module.local.split(".")[-2:])
    for name in (two, leaf):
        for first, last in _PLAIN:
            if name in (first, last) and (first != "up_proj" or {first, last} <= has):
                return "fc1" if name == first else "fc2"
    return None


def _numbered(module: Module) -> str | None:
    # `mlp.0`, `mlp.2`: the first and last matrix of a sequence; activations between them have no weights.
    numbers = sorted(int(n) for n in module.siblings if n.isdigit())
    if not module.leaf.isdigit() or _vector(module):
        return None
    if len(numbers) == 2:
        return ("fc1", "fc2")[numbers.index(int(module.leaf))]
    return None


def _by_shape(module: Module) -> str:
    if _vector(module):
        return "norm"  # only norms have a weight that is a vector
    if module.ndim == 2 and (not _bare(module) or module.leaf.endswith("_weight")):
        sense = module.tower in ("vision", "audio", "vq", "vocoder", "qformer") and not module.layered
        if module.tower == "projector" or sense and re.search(r"proj|linear", module.leaf):
            return "proj"
    return "other"
