"""Tiny random models of any architecture that transformers knows: the default config with reduced sizes."""

import contextlib
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, VOCAB = 64, 256

# Settings with a matching name are reduced to this size; the first row that matches wins.
_SIZES: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), value)
    for pattern, value in (
        (
            (
                r"vocab_size_per_layer_input|vocab_size|n_vocab|\w+_vocab_size|codebook_size"
                r"|audio_vocab_size"
            ),
            VOCAB,
        ),
        (
            (
                r"(?:num_(?:hidden|encoder|decoder|conv_pos)?_?layers|n_layers?|(?:en|de)coder_layers"
                r"|depth|n_layer|num_(?:local|global)_(?:hidden_)?layers|num_block_layers"
                r"|num_attention_layers|num_hidden_blocks|attention_layers|layers|(?:en"
                r"|de)coder_num_hidden_layers|depth_decoder_num_hidden_layers|num_qformer_layers"
                r"|perception_layers)"
            ),
            2,
        ),
        (r"num_key_value_heads|num_kv_heads|n_kv_heads|n_head_kv|kv_n_heads", 2),
        (
            (
                r"(?:num_(?:attention_)?heads|n_heads?|(?:en|de)coder_attention_heads|num_(?:global"
                r"|local|cross)_heads|attention_heads|num_heads|\w+_num_attention_heads"
                r"|num_attention_heads_\w+|n_attn_heads|cross_num_\w+)"
            ),
            4,
        ),
        (r"head_dim|d_kv|d_head|attention_head_dim|global_head_dim|\w+_head_dim|kv_channels", 16),
        (
            (
                r"(?:moe_|shared_expert_|\w+_)?intermediate_size\w*|(?:en|de)coder_ffn_dim|ffn_dim"
                r"|n_inner|ffn_hidden_size|d_ff|dim_ff|intermediate_dim|moe_ffn_hidden_size|inner_dim"
                r"|block_ff_dim"
            ),
            96,
        ),
        (
            (
                r"hidden_size|d_model|n_embd|embed_dim|dim|\w*hidden_size|\w*_d_model|projection_dim"
                r"|output_dim|hidden_dim|word_embed_proj_dim|embedding_size|model_dim|emb_dim"
                r"|lm_hidden_dim|\w+_hidden_dim|adapter_hidden\w*|embedding_dim|\w+_embed_dim"
                r"|output_size|hidden_size_\w+|proj_dim|\w+_projection_dim|width|lru_width|embed_dims"
            ),
            HIDDEN,
        ),
        (r"(?:num_(?:local_|routed_)?experts|n_routed_experts|moe_num_experts|num_total_experts)", 4),
        (
            (
                r"(?:num_experts_per_tok(?:en)?|top_k_experts|moe_top_k|moe_k|num_selected_experts"
                r"|experts_per_tok)"
            ),
            2,
        ),
        (r"q_lora_rank|kv_lora_rank|\w*lora_rank", 24),
        (r"max_position_embeddings|n_positions|max_(?:source|target)_positions|max_seq_len\w*", 512),
    )
)
_TOKEN = re.compile(r"\w*(?:_token_id|_token_index|_token|_id)s?")

# Further settings that smaller sizes need, by model type; a dot in a key leads into a section.
_MEDIA = {"<image>": 5, "IMGIMGBSBSZ": 6, "IMGIMGABCDZ": 7, "<|extra_200|>": 8, "<|visual token 000000|>": 9}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": _MEDIA},
    "emu3": {"vocabulary_map": _MEDIA},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 2, "ffn_config.moe_num_experts": 4,
             "ffn_config.moe_top_k": 2},
    "dots1": {"n_routed_experts": 4, "num_local_experts": 4, "first_k_dense_replace": 1,
              "moe_intermediate_size": 48, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "codegen": {"rotary_dim": 8},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4,
                  "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2},
    "nemotron": {"num_key_value_heads": 2},
    "falcon": {"new_decoder_architecture": False},
}  # fmt: skip
# Settings that a config expands for each layer when it is created, so they must be given from the start.
_AT_BIRTH: dict[str, dict[str, Any]] = {
    kind: {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
           "intermediate_size": 96, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 2,
           "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
           "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
           "initializer_range": 0.1}
    for kind in ("gemma4_text", "gemma4", "gemma4_unified", "gemma4_unified_text")
}  # fmt: skip

_MAPPINGS = (
    "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ",
    "MASKED_LM", "CTC", "TEXT_TO_WAVEFORM", "ZERO_SHOT_IMAGE_CLASSIFICATION", "PRETRAINING", "",
)  # fmt: skip


def class_for(model_type: str) -> type[Any]:
    """Return the class that transformers uses for the largest task of a type."""
    for task in _MAPPINGS:
        name = f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES"
        found = getattr(modeling_auto, name).get(model_type)
        if found:
            one = found if isinstance(found, str) else found[0]
            return getattr(transformers, one)  # type: ignore[no-any-return]
    raise KeyError(model_type)


def tiny(model_type: str, class_name: str | None = None, *, seed: int = 0) -> nn.Module:
    """Build a tiny random model of a type. Raises the error of transformers if the sizes don't fit."""
    kind = getattr(transformers, class_name) if class_name else class_for(model_type)
    config = _born(model_type)
    if not isinstance(config, kind.config_class) and class_name is None:
        config = kind.config_class()
    shrink(config)
    for path, value in _OVERRIDES.get(model_type, {}).items():
        *sections, key = path.split(".")
        at = config
        for name in sections:
            at = getattr(at, name)
        setattr(at, key, value)
    torch.manual_seed(seed)
    make = getattr(kind, "_from_config", kind)
    model: nn.Module = make(config).eval()
    return model


def _born(model_type: str) -> Any:
    given = _AT_BIRTH.get(model_type)
    if given and hasattr(CONFIG_MAPPING[model_type](), "text_config"):
        given = {"text_config": given}
    return CONFIG_MAPPING[model_type](**(given or {}))


def shrink(config: Any) -> None:
    """Reduce every size in a config and its sections."""
    if ("gemma4" in config.model_type and hasattr(config, "global_head_dim")) or (
        config.model_type in _AT_BIRTH and "text" in config.model_type
    ):
        _tokens(config)
        return
    before = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    for key, value in before.items():
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            new = _smaller(key, value)
            if new != value:
                _set(config, key, new)
    heads = [before.get(k) for k in ("num_attention_heads", "n_head", "num_heads")]
    many = next((h for h in heads if isinstance(h, int)), None)
    if many and before.get("num_key_value_heads") == many:
        _set(config, "num_key_value_heads", _smaller("num_attention_heads", many))
    _tokens(config)
    _lists(config)
    _fill(config)


def _set(config: Any, key: str, value: Any) -> None:
    # Some settings are properties that the config computes.
    with contextlib.suppress(AttributeError, NotImplementedError, ValueError, TypeError):
        setattr(config, key, value)


def _smaller(key: str, value: int) -> int:
    for pattern, most in _SIZES:
        if pattern.fullmatch(key):
            return min(value, most)
    return value


def _tokens(config: Any) -> None:
    """Move the special tokens into the small vocabulary, each to its own id."""
    last = VOCAB - 1
    for key, value in list(vars(config).items()):
        if not _TOKEN.fullmatch(key):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value >= VOCAB:
            _set(config, key, last)
            last -= 1
        if isinstance(value, (list, tuple)) and any(isinstance(v, int) and v >= VOCAB for v in value):
            _set(config, key, [last - n for n in range(len(value))])
            last -= len(value)


def _lists(config: Any) -> None:
    """Shorten lists with an entry for each layer to two entries, of both kinds if there are two."""
    layers = next((getattr(config, k, None) for k in ("num_hidden_layers", "n_layer", "num_layers")), None)
    for key, value in list(vars(config).items()):
        if re.fullmatch(
            r"\w*layer_types|layers_block_type|block_types|attn_layer\w*types", key
        ) and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            if layers and len(kinds) <= 4:
                count = max(2, len(kinds))
                for name in ("num_hidden_layers", "n_layer", "num_layers"):
                    if isinstance(getattr(config, name, None), int):
                        _set(config, name, count)
                _set(config, key, (kinds * 2)[-count:] if len(kinds) > 1 else kinds * count)


def _fill(config: Any) -> None:
    """Fill in settings that a model needs and the default config leaves out."""
    for key in ("initializer_range", "init_std", "init_scale"):
        value = getattr(config, key, None)
        if isinstance(value, float) and value < 0.1:
            # With smaller weights softmax and activations are almost linear, and tests would show little.
            _set(config, key, 0.1)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope:
        # Models that rotate positions in time, height and width read it, others ignore it.
        _set(config, "rope_parameters", {**rope, "mrope_section": [2, 3, 3]})
    if hasattr(config, "head_dim") and config.head_dim is None:
        _set(config, "head_dim", 16)
    for key, value in (("pad_token_id", 0), ("shared_expert_intermediate_size", 96), ("vocab_size", VOCAB)):
        if hasattr(config, key) and getattr(config, key) is None:
            _set(config, key, value)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(size, int) and isinstance(patch, int) and size > 4 * patch:
        _set(config, "image_size", 4 * patch)
    if isinstance(size, (list, tuple)) and isinstance(patch, int):
        _set(config, "image_size", [4 * patch] * len(size))


_NAMES = """
    afmoe aimv2 aimv2_vision_model albert altclip apertus arcee aria aria_text
    audio-spectrogram-transformer audioflamingo3 audioflamingo3_encoder axk1 axk2 aya_vision bamba bark
    bart beam beit bert bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small
    blip blip-2 blip_2_qformer bloom bridgetower camembert canary canine chinese_clip
    chinese_clip_vision_model clap clip clip_text_model clip_vision_model clipseg clvp codegen cohere
    cohere2 cohere2_moe cohere2_vision cohere_asr cohere_compass_vision colmodernvbert colpali colqwen2
    convbert cosmos3_edge cosmos3_edge_text cosmos3_edge_vision cosmos3_omni cpmant ctrl cwm d_fine
    data2vec-audio data2vec-text data2vec-vision dbrx deberta deberta-v2 decision_transformer deepseek_v2
    deepseek_v3 deepseek_v32 deepseek_v4 deepseek_vl deepseek_vl_hybrid deimv2 deit depth_pro dia
    diffllama dinov2 dinov2_with_registers dinov3_vit distilbert doge dots1 dots3_note_text dpr dpt
    efficientloftr electra encoder-decoder ernie ernie4_5 ernie4_5_moe ernie4_5_vl_moe esm esmc eurobert
    evolla exaone4 exaone4_5 exaone4_5_vision exaone_moe falcon fastspeech2_conformer flaubert flava
    flex_olmo flint fnet fsmt fun_asr_nano fun_asr_nano_encoder fuyu gemma gemma2 gemma3 gemma3_text
    gemma3n_audio gemma4 gemma4_audio gemma4_text gemma4_unified gemma4_unified_text gemma4_vision git glm
    glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe glm4v_moe_text glm4v_moe_vision glm4v_text
    glm4v_vision glm5_next_vision glm_image glm_image_text glm_image_vision glm_moe_dsa glm_ocr
    glm_ocr_text glm_ocr_vision glmasr glmasr_encoder glmga glpn got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo
    gpt_neox gpt_neox_japanese gpt_oss gptj gradium_phonon_tts granite granite_docling
    granite_docling_text granite_docling_vision granite_speech granite_speech5_ctc granite_speech5_encoder
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared grounding-dino gte helium
    higgs_audio_v2 hubert hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hunyuan_vl_text hunyuan_vl_vision
    hy_v3 hy_v4 hyperclovax hyperclovax_vision_v2 ibert idefics idefics2 idefics3 idefics3_vision ijepa
    imagegpt inkling2 inkling2_vision instructblip instructblipvideo internlm3 internvl internvl_vision
    iquestcoder jais2 jamba janus jetmoe jina_embeddings_v3 kimi_k25 kimi_k25_vision kolibri1 kosmos-2
    kosmos-2.5 laguna lasr_ctc lasr_encoder layoutlm layoutlmv3 lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl
    lfm3_vl_vision lighton_ocr llama llama4 llama4_text llava llava_next llava_next_video llava_onevision
    longcat_flash longt5 luke lw_detr lxmert m2m_100 marian markuplm mask2former mbart megatron-bert
    mellum metaclip_2 mgp-str mimi_encoder mimo_v2_flash minicpm3 minicpm_ocr minicpm_ocr_vision
    minicpmv4_6 minicpmv4_7 minicpmv4_7_vision minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text
    ministral ministral3 mistral mistral3 mistral4 mistral_large4 mistral_large4_text mixtral mlcd
    mlcd_vision_model mllama mm-grounding-dino mobilebert mobilevit modernbert modernbert-decoder
    modernvbert molmo2 molmo2_text moonshine moshi moss_transcribe_diarize moss_transcribe_diarize_audio
    mpnet mpt mra mt5 muse_glimmer muse_glimmer_assistant muse_glimmer_text muse_glimmer_vision
    muse_spark_audio muse_spark_vision musicflamingo musicgen musicgen_melody mvp nanochat nemotron
    nemotron3_5_asr nemotron3_5_transcribe_asr_audio nemotron3_5_transcribe_audio
    nemotron3_5_transcribe_word_timestamp nemotron3_diarization nemotron3_diarization_audio
    nemotron_asr_streaming nemotron_asr_streaming_encoder nemotron_h_omni neomme nllb-moe nomic_bert
    nystromformer olmo olmo2 olmo3 olmo_hybrid olmoe oneformer openai-gpt openai_privacy_filter opt ovis2
    owlv2 owlvit paddleocr_vl paligemma parakeet_ctc parakeet_encoder parakeet_rnnt parakeet_tdt
    patchtsmixer patchtst pe_audio pe_audio_encoder pegasus persimmon phi phi3 phi4_multimodal phimoe pi0
    pix2struct pixio pixtral plbart pocket_tts pocket_tts_audio_tokenizer_encoder pop2piano pp_chart2table
    pp_doclayout_v4 qianfan_ocr qianfan_ocr_vision qwen2 qwen2_5_omni qwen2_5_omni_thinker qwen2_5_vl
    qwen2_5_vl_text qwen2_5_vl_vision qwen2_audio qwen2_audio_encoder qwen2_moe qwen2_vl qwen2_vl_text
    qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_moe_vision qwen3_5_text qwen3_5_vision qwen3_asr
    qwen3_asr_encoder qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen3_vl_moe_text
    qwen3_vl_moe_vision qwen3_vl_text qwen3_vl_vision qwen4_exp_vision radio recurrent_gemma rembert
    rf_detr roberta roberta-prelayernorm roc_bert roformer rt_detr rt_detr_v2 rwkv sam
    sam2_hiera_det_model sam2_vision_model sam3 sam3_lite_text sam3_tracker sam3_tracker_video sam3_video
    sam3_vision_model sam3_vit_model sam_hq sam_hq_vision_model sam_vision_model sapiens2 seamless_m4t
    seamless_m4t_v2 seed_oss segformer seggpt sew sew-d shieldgemma2 siglip siglip2 siglip2_vision_model
    siglip_vision_model smollm3 smolvlm smolvlm_vision solar_open speech-encoder-decoder speech_to_text
    speecht5 splinter stablelm starcoder2 step3p7 swin switch_transformers t5 t5gemma t5gemma2 tapas
    timesfm2_5 timesformer tipsv2 tipsv2_text_model tipsv2_vision_model trocr tvp udop ultrabert
    ultravbert umt5 unispeech unispeech-sat unlimited_ocr vaultgemma video_llama_3 video_llama_3_vision
    video_llava videomae vilt vipllava vision-encoder-decoder vision-text-dual-encoder visual_bert vit
    vit_mae vit_msn vitdet voxtral voxtral_encoder voxtral_realtime voxtral_realtime_encoder wav2vec2
    wav2vec2-conformer wavlm whisper xclip xcodec xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod yolos
    youtu zamba2 zaya
"""
MODEL_TYPES: tuple[str, ...] = tuple(_NAMES.split())
