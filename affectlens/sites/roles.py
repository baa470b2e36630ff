"""Find the role of a module with one ordered table of path patterns and conditions.

The first row that matches wins. A name is not enough: routers and attention gates are called `gate_proj` too.
So rows have conditions (inside an attention, a bare parameter, a vector). `mlps.py` handles the matrices of
MLPs, which no row matches.
"""

import re
from functools import lru_cache

from affectlens.sites.mlps import FUSED_GATE_UP, in_mlp
from affectlens.sites.module import (  # fmt: skip
    KV,
    K,
    Module,
    Need,
    Q,
    V,
    as_long_as_the_vocabulary,
    attention_matrix,
    bare,
    both,
    convolution,
    in_attention,
    in_state_space,
    near_experts,
    outside_layers,
    vector,
)
from affectlens.sites.names import words

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

_O = words(
    r"""
    o o_proj out out_proj proj proj_out dense output output\.dense to_out to_out\.0 wo Wo c_proj out_lin
    linear_out projection(?:_layer)? output_proj out_projection resid_proj layout_output\.dense final
    post(?:_proj)? o_attn output_linear attention_out
    """
)
_NORM = words(
    r"""
    \w*norm(?:s|_?\d+|_?[a-z]{1,4}|alization)? \w*_norm_\w+ \w*LayerNorm\w* \w*layernorm\w* \w*layrnorm
    \w*layer_norm\w* ln(?:_?\w{1,6})? \w+_ln bn\d* \w*rms_?norm\w* norm_\w+
    """
)
_POSITION = words(
    r"""
    \w*pos(?:ition(?:al)?)?_?embed(?:ding)?s?\w* embed_positions(?:\.\w+)? wpe pos_emb
    \w*relative_attention_bias relative_position_bias_table rel_pos_\w+ \w*distance_embedding
    rel_attn_embed pos_bias_[uv] bias_[uv] emb_rel_[kv] linear_pos relative_k_proj pos_proj
    position_embedding_table \w*position_embeddings?\w* positional_encoding\w* r_[rsw]_bias r_kernel
    positions_embed (?:row|column|tile)_embedd(?:ing|er)s? rel_embeddings
    \w*positional_embedding\.embedding \w*image_positions relative_attention_bias_layer\.bias_values
    rel_logits_proj\.proj pos_(?:q|query|key)_proj rel_attn\.r position_embeddings\.weights\.\d+
    time_embeddings
    """
)
_LM_HEAD = words(
    r"""
    \w*lm_heads?(?:\.\d+)? embed_out cls\.predictions predictions\.decoder predictions unembed
    pred_layer\.proj lm_head\.(?:decoder|additional_fc) logits_dense lm_loss generator_lm_head ctc_head
    codec_head codebooks_head joint\.head head_code\.\d+ generation_head\.vision_head
    """
)
_TOKENS = words(
    r"""
    wte word_embeddings? \w*tok(?:en)?_embeddings? embed_in shared embeddings word_embedding embed
    \w*embed_tokens\w*(?:\.\d+)? embed_\w*tokens input_embeds_layers?(?:\.\d+)? input_embedding
    tokens_embed embedding transformer\.w generation_embeddings codec_embed
    (?:codec|code|unit)_embedding(?:\.\d+)? embed_char emb_text emb_code\.\d+
    embed_tokens\.additional_embedding (?:entity|value)_embeddings
    """
)
_TRUNK = words("model transformer language_model llm decoder")
_LEARNED = words(
    r"""
    cls_token class_embedding cls_emb\w* \w*cls_\w*token register_tokens mask_token distillation_token
    probe \w*query_tokens latent_query latents? \w*query queries query_\d+\w* image_newline
    masked_spec_embed query_embed\w* class_pos_emb \w+_tokens? view_sep[ae]rator \w*extens[eo]r
    (?:glb|sub)_GN boi eoi image_(?:begin|end|sep) mask_emb embed_global silence_embeds
    """
)


def _language(module: Module) -> bool:
    return module.tower not in ("vision", "projector", "vocoder", "generation")


def _table_of_tokens(module: Module) -> bool:
    if module.ndim != 2 or module.layered or bare(module):
        return False
    return module.tower not in ("vision", "vq", "projector") or module.parents.endswith(
        ("embed_audio", "embed_vision")
    )


def _output_gate(module: Module) -> bool:
    gated_mlp = {"gate_proj", "up_proj"} <= module.siblings.keys() | {module.leaf}
    return in_attention(module) and not gated_mlp and "compressor" not in module.parents


def _router(module: Module) -> bool:
    return not bare(module) and (near_experts(module) or bool(re.search(r"router|gatenet", module.local)))


def _short_convolution(module: Module) -> bool:
    return bool(module.siblings.keys() & {"conv", "spatial_conv"})


# (role, the end of the path, a condition)
_TABLE: tuple[tuple[str, re.Pattern[str], Need | None], ...] = tuple(
    (role, re.compile(rf"(?:^|\.){words(pattern)}$"), need)
    for role, pattern, need in (
        ("norm_stat", r"running_mean running_var num_batches_tracked", bare),
        # DeepSeek's sparse attention picks tokens with a small attention of its own.
        ("other", r"indexer\.\S+", lambda m: not vector(m)),
        ("attn_sinks", r"sinks?", bare),
        ("ssm_A", r"A_log", None),
        ("ssm_D", r"D", bare),
        ("ssm_dt_bias", r"dt_bias", bare),
        ("ssm_conv", r"conv1d [qkv]_conv1d", both(in_state_space, convolution)),
        ("ssm_dt_proj", r"dt_proj(?:_weight|_bias)?", None),
        ("ssm_x_proj", r"x_proj(?:_weight)?", in_state_space),
        ("q_norm", r"q_norm q_layernorm query_layernorm q_ln norm_q", None),
        ("k_norm", r"k_norm k_layernorm key_layernorm k_ln norm_k", None),
        ("router_bias", r"e_score_correction_bias expert_bias router_bias", None),
        ("router", r"router gate wg router\.(?:layer|classifier|gate|gate_proj|weight|proj) gate\.wg "
                   r"gatenet(?:\.\w+)* gate_network", _router),
        ("router", r"router gate_weight gate\.wg router_gate gate\.down_proj router_mlp\.\w+", None),
        ("shared_expert_gate", r"shared_experts?_gate", None),
        ("gate_scalar", r"\w*residual_gate\.gate", None),
        # A gate in an attention multiplies its output; only in a gated MLP is `gate_proj` what it says.
        ("attn_out_gate", r"gate_proj g_proj gate in_proj_z linear_gate g_[ab]_proj output_gate "
                          r"out_gate head_gate", _output_gate),
        ("other", r"compressor\.\S+", lambda m: m.ndim == 2),
        ("time_mix", r"time_(?:mix_\w+|decay|first|maa_\w+|faaaa)", None),
        ("receptance", r"receptance", None),
        ("norm", r"\w*norm\.(?:gamma|beta)", None),
        ("scale", r"lambda_?(?:[qk]?\d|s)? alpha_[pn] temp input_residual post_attention_residual "
                  r"pos_emb_alpha\w* gamma(?:_\d)? \w*layer_?scale\w* \w+_gamma ls\d?(?:\.\w+)? scale "
                  r"scaling alpha beta logit_(?:scale|bias)\w* temperature global_scale per_dim_scale "
                  r"layer_scalar \w+_scale high_res_vision_alpha", bare),
        # Flamingo and Mllama scale what a cross attention adds by the tanh of a single number.
        ("gate_scalar", r"gate_attn gate_ffn gate_ffw gate_attention gate \w*_gate attn_gate ffn_gate "
                        r"alpha_\w+", lambda m: bare(m) and m.ndim <= 1),
        ("type_embed", r"\w*token_type_embeddings?(?:_\d+)? type_embeddings? segment_emb(?:eddings?)? "
                       r"seg_embed", None),
        ("pos_embed", _POSITION, lambda m: not vector(m) and not convolution(m)),
        ("norm", _NORM, lambda m: m.ndim <= 1 or bare(m)),
        ("lm_head", _LM_HEAD, lambda m: (outside_layers(m) and not in_attention(m)) or m.leaf == "lm_head"),
        ("lm_head", rf"^(?:{_TRUNK}\.)*{words('proj_out output_projection output output_layer ff_out')}",
         both(outside_layers, _language)),
        # These names may be any head: one output for each token decides.
        ("lm_head", r"decoder head cls head\.decoder lm_head\.out_proj embedding_decoder "
                    r"entity_predictions vocab_projector", as_long_as_the_vocabulary),
        ("embed_tokens", r"wte\.embedding new_embedding", None),
        ("head_dense", r"\w*predictions\.transform\.dense "
                       r"(?:\w*head|predictions|generator_predictions|classifier|pooler)\.dense "
                       r"vocab_transform bert\.pooler", outside_layers),
        ("embed_tokens", _TOKENS, _table_of_tokens),
        ("learned_token", _LEARNED, bare),
        ("learned_token", r"audio_bos_eos_token cls_embedding", None),
        ("patch_embed", r"\w*patch_embed(?:ding|dings|der)?(?:\.\w+)* patch_conv \w*patch_projection "
                        r"patchify embed_patches\.proj", outside_layers),
        ("patch_embed", r"embeddings\.proj(?:ection)?",
         lambda m: outside_layers(m) and (m.ndim >= 3 or m.tower in ("vision", "audio"))),
        ("conv_pw", r"pointwise_conv\d? pw_conv\w* pwconv\d? ext_pw_conv\w*", lambda m: m.ndim >= 3),
        ("q_proj", r"experts\.input_linear", in_attention),  # a mixture of attentions
        ("o_proj", r"experts\.output_linear", in_attention),
        ("gate_up_proj", r"input_linear", lambda m: m.ndim == 3),
        ("down_proj", r"output_linear", lambda m: m.ndim == 3),
        # Every other convolution, unless it is a projection of an attention.
        ("conv", r"\S+", lambda m: convolution(m) and not attention_matrix(m)),
        ("kv_a_proj_with_mqa", r"kv_a_proj_with_mqa wkv_a_with_mqa kv_a_proj", None),
        ("kv_b_proj", r"kv_b_proj wkv_b", None),
        ("q_a_proj", r"q_a_proj wq_a", None),
        ("q_b_proj", r"q_b_proj wq_b q_gate_proj", None),
        ("q_proj", r"q_proj", None),
        ("k_proj", r"k_proj", None),
        ("v_proj", r"v_proj", None),
        # The cross attention of GPT-2: q_attn has the queries, so c_attn holds keys and values alone.
        ("kv_proj", r"c_attn", lambda m: "q_attn" in m.siblings),
        ("qkv_proj", r"g?qkv_proj qkv query_key_value [Ww]qkv c_attn att_proj in_proj_qkvz? W_pack "
                     r"w_qkv to_qkv", None),
        ("proj", r"kv_proj", lambda m: "attn" in m.siblings),
        ("kv_proj", KV, in_attention),
        ("ssm_in_proj", r"in_proj in_proj_[ab] in_proj_ba [abf]_proj f_[ab]_proj linear_[xy]",
         in_state_space),
        ("ssm_in_proj", r"in_proj", _short_convolution),
        ("qkv_proj", r"in_proj", in_attention),
        ("ssm_out_proj", r"linear_out", in_state_space),
        ("ssm_out_proj", r"out_proj",
         lambda m: in_state_space(m) and (not in_attention(m) or "o_proj" in m.siblings)),
        ("ssm_out_proj", r"out_proj", both(_short_convolution, lambda m: not in_attention(m))),
        ("q_proj", Q, both(in_attention, lambda m: not bare(m) or "k" in m.siblings)),
        ("k_proj", K, in_attention),
        ("v_proj", V, in_attention),
        ("o_proj", r"o_proj attn_out o_b_proj", None),
        ("o_proj", _O, both(in_attention, lambda m: "bottleneck" not in m.parents)),
        ("gate_up_proj", rf"{FUSED_GATE_UP}(?:_bias)?", None),
    )
)  # fmt: skip


def role(module: Module) -> str:
    """Name the role of a module; `other` if its name and siblings establish none."""
    for found, need in _rows(module.local):
        if need is None or need(module):
            return found
    return _of_bias(module) or in_mlp(module) or _by_shape(module)


@lru_cache(maxsize=1 << 14)
def _rows(local: str) -> tuple[tuple[str, Need | None], ...]:
    """Return the rows whose pattern matches a path; every layer has the same paths."""
    return tuple((found, need) for found, pattern, need in _TABLE if pattern.search(local))


def _of_bias(module: Module) -> str | None:
    """Give a bias beside its matrix, such as `q_bias` beside `q`, the role of the matrix."""
    if not bare(module) or not module.leaf.endswith("_bias") or "experts" in module.local:
        return None
    stem = module.leaf.removesuffix("_bias")
    for name in (stem, f"{stem}_proj"):
        if name in module.siblings or stem in ("q", "k", "v"):
            path = f"{module.parents}.{name}".lstrip(".")
            return role(module._replace(local=path, params={"weight": (1, 1)}))
    return None


def _by_shape(module: Module) -> str:
    if vector(module):
        return "norm"
    # A matrix outside of the layers of a projector or encoder maps one width to another.
    if module.ndim == 2 and (not bare(module) or module.leaf.endswith("_weight")):
        sense = module.tower in ("vision", "audio", "vq", "vocoder", "qformer", "talker", "generation")
        head = re.search(r"head|classif|predict|codebook|token|embed\w*$", module.local)
        if module.tower == "projector" or (sense and not module.layered and not head):
            return "proj"
    return "other"
