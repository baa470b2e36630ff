"""Hostile names, shapes and configs cause no crash and no hang; each element is in exactly one site."""

import math
import random

import pytest

from affectlens.errors import CheckpointError
from affectlens.sites import locate

WORDS = """
    model layers 0 1 mlp experts gate_proj up_proj down_proj self_attn q_proj k_proj v_proj o_proj qkv in_proj
    weight bias c_attn kv_b_proj kv_a_proj_with_mqa q_norm ( [a-z]* \\ é 𝔵 router visual blocks attn proj
    gate_up_proj c_proj fc1 fc2 Wi Wo w1 w2 w3 input_linear A_log conv1d N 99999999999999999999 -1 lm_head
    embed_tokens encoder decoder audio_tower thinker in_proj_weight query_key_value wqkv to_kv
"""
PARTS = [*WORDS.split(), ""]
CONFIGS: tuple[dict[str, object], ...] = (
    {},
    {"model_type": ["x"], "architectures": 3},
    {"model_type": "falcon", "num_attention_heads": 0, "text_config": [1]},
    {"model_type": "gpt_neox", "num_attention_heads": 10**30},
    {"model_type": "bloom", "n_head": -4, "attn_config": 5},
    {"model_type": "internlm2", "num_attention_heads": 3, "num_key_value_heads": 7},
    {"model_type": "codegen", "n_head": 3, "architectures": [None]},
    {"model_type": "qwen3_next", "linear_num_key_heads": 2, "linear_num_value_heads": 1, "head_dim": True},
    {"model_type": "llava", "text_config": {"model_type": 7, "num_attention_heads": 2.5}},
    {"model_type": "deepseek_v3", "qk_nope_head_dim": 3, "v_head_dim": 5, "kv_lora_rank": 2},
    {"model_type": "gpt_oss", "num_attention_heads": "4"},
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.get("model_type", "none")))
def test_every_element_is_in_exactly_one_site(config: dict[str, object]) -> None:
    """Random names of real words, with random shapes of empty and absurd dimensions, are all accepted."""
    rng = random.Random(str(config))
    for _ in range(200):
        names = {
            ".".join(rng.choices(PARTS, k=rng.randint(1, 7))): tuple(
                rng.choices((0, 1, 2, 3, 4, 6, 8, 12, 24, 48, 10**13), k=rng.randint(0, 4))
            )
            for _ in range(rng.randint(1, 12))
        }
        try:
            sites = locate(names, config=config)
        except CheckpointError:  # two names of one parameter
            continue

        assert sum(map(math.prod, names.values())) == sum(where.size for where in sites.values()), names
