"""Models with two layers and random weights, built from configs written here; nothing is downloaded."""

import torch
import transformers
from torch import nn

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "in_channels": 3, "patch_size": 14}


def tiny(model_type: str, *, seed: int = 0, **other: int) -> nn.Module:
    """Build a tiny random model of a type that transformers knows."""
    torch.manual_seed(seed)
    text, vision = {**TEXT, **other}, dict(VISION)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    settings: dict[str, object] = {
        "llava": {
            "text_config": {"model_type": "llama", **text},
            "image_token_id": 63,
            "image_token_index": 63,
        },
        "gemma3": {"text_config": text},
        "qwen2_vl": {
            "text_config": {**text, "rope_parameters": rope},
            "vision_config": {**QWEN_VISION, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2},
        },
        "qwen2_5_vl": {
            "text_config": {**text, "rope_parameters": rope},
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 24,
                "intermediate_size": 40,
                "out_hidden_size": 32,
            },
        },
        "qwen3_vl": {
            "text_config": {**text, "rope_parameters": rope},
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 24,
                "intermediate_size": 40,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
    }.get(model_type, text)
    if model_type == "llava":
        settings["vision_config"] = {"model_type": "clip_vision_model", **vision}
    if model_type == "gemma3":
        settings["vision_config"] = {"model_type": "siglip_vision_model", **vision}
        settings["mm_tokens_per_image"] = 4
    config = transformers.AutoConfig.for_model(model_type, **settings)
    kinds = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
    kind = kinds[0] if type(config) in kinds[0]._model_mapping else kinds[1]
    return kind.from_config(config).eval()


def nudge(model: nn.Module, fragment: str, *, scale: float = 0.01, seed: int = 1) -> nn.Module:
    """Move every parameter whose name holds `fragment` by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if fragment in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model
