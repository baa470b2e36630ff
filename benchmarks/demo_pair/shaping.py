"""The architecture: a native LLaVA small enough to travel inside a package."""

import copy
from pathlib import Path

import torch
from drawing import SMALL
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from words import CHAT_TEMPLATE, SPECIAL

WIDTH, LAYERS, INNER, HEADS = 128, 4, 352, 4
PATCH = 16
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_config(vocabulary: int) -> LlavaConfig:
    """Return the configuration: a 64 px CLIP tower and a four-layer Llama, tied embeddings."""
    vision = CLIPVisionConfig(
        hidden_size=176,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SMALL,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=None,
        eos_token_id=SPECIAL.index("</s>"),
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL.index("<image>"),
        image_seq_length=(SMALL // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def make_model(embeddings: torch.Tensor, seed: int) -> LlavaForConditionalGeneration:
    """Return a fresh model whose word embeddings start from `embeddings`."""
    torch.manual_seed(seed)
    config = make_config(len(embeddings))
    config._attn_implementation = "sdpa"
    model = LlavaForConditionalGeneration(config).float()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        # Rows SmolLM2 knows nothing about keep a small random start.
        rows = embeddings.abs().sum(1, keepdim=True) > 0
        start = torch.where(rows, embeddings, torch.randn_like(embeddings) * 0.5)
        table.copy_(start * 0.05)
    model.tie_weights()
    return model


def make_processor(tokenizer) -> LlavaProcessor:
    """Return the processor; the picture is only scaled to -1..1, never cropped."""
    from transformers import CLIPImageProcessorPil

    picture = CLIPImageProcessorPil(
        size={"height": SMALL, "width": SMALL},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=picture,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def linear_names(model, roles=ROLES) -> list[str]:
    """Return the parameter names of the language model's linear layers of these roles."""
    names = [
        name
        for name, _ in model.named_parameters()
        if "language_model.layers" in name and name.split(".")[-2] in roles
    ]
    if len(names) != LAYERS * len(roles):
        raise ValueError(f"expected {LAYERS * len(roles)} matrices of {roles}, found {len(names)}")
    return names


def round_weights(model) -> None:
    """Round every weight to what bf16 keeps, so that frozen weights are bit-identical on disk.

    Only parameters: casting the whole module would also spoil the rotary frequencies.
    """
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())


def save(model, processor, folder: Path) -> None:
    """Write one bf16 checkpoint that names no path of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    copied = copy.deepcopy(model).bfloat16()
    for config in (copied.config, copied.config.text_config, copied.config.vision_config):
        config._name_or_path = ""
    copied.save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
