"""The section of a config that describes a tower."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_KEYS = {
    "language": r"text_config|llm_config|language_config|text_model_config|decoder",
    "vision": r"vision_config|visual|vit_config|image_config",
    "audio": r"audio_config|speech_config|audio_encoder\w*|encoder_config",
    "qformer": r"qformer_config|speech_qformer_config",
    "talker": r"talker_config",
}
_GENERATES = re.compile(r"For(?:CausalLM|ConditionalGeneration)$")
_LONGEST = 100  # characters of a model type
_TOWER = re.compile("|".join(f"(?P<{tower}>{names})" for tower, names in _KEYS.items()))


def sections(config: Mapping[str, Any], towers: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Find the settings of each tower; a tower without a section has those at the top level.

    >>> sections({"model_type": "llava", "text_config": {"num_attention_heads": 8}}, ["language"])
    {'language': {'num_attention_heads': 8, 'model_type': 'llava'}}
    """
    own: dict[str | None, Mapping[str, Any]] = {}
    for key, part in _parts(config):
        match = _TOWER.fullmatch(key)
        if match:
            own.setdefault(match.lastgroup, part)
    found = {tower: own.get(tower, config) for tower in towers}
    return {
        tower: {**part, "model_type": model_type(part) or model_type(config)} for tower, part in found.items()
    }


def model_type(config: Mapping[str, Any]) -> str:
    """Return the model type that a config states; empty if it is missing or not a short string."""
    stated = config.get("model_type")
    return stated if isinstance(stated, str) and len(stated) <= _LONGEST else ""


def number(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first of these settings that is a positive whole number.

    A config may come from a stranger, so any other value counts as missing.
    """
    return next((n for key in keys if type(n := config.get(key)) is int and n > 0), None)


def heads(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the number of attention heads, and that of k and v: fewer with grouped queries.

    >>> heads({"num_attention_heads": 32, "num_key_value_heads": 8})
    (32, 8)
    """
    every = number(
        config,
        "num_attention_heads",
        "n_head",
        "num_heads",
        "n_heads",
        "encoder_attention_heads",
        "heads",
        "attention_heads",
        "decoder_attention_heads",
    )
    inner = config.get("attn_config")  # DBRX and MPT
    grouped = number(inner, "kv_n_heads") if isinstance(inner, dict) else None
    grouped = grouped or number(
        config, "num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "multi_query_group_num"
    )
    return every, grouped or every


def ties(config: Mapping[str, Any], *, whole: bool) -> bool:
    """Return whether the output embedding is the input embedding by a config.

    If the config doesn't say, it is in a language model that stores no output embedding (`whole` is False):
    older configs leave out what is the default of their type.

    >>> ties({"text_config": {"tie_word_embeddings": True}}, whole=False)
    True
    """
    text, known = config.get("text_config"), config.get("architectures")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    stated = config.get("tie_word_embeddings", inner)
    if stated is not None:
        return bool(stated)
    return not whole and isinstance(known, list) and any(_GENERATES.search(str(name)) for name in known)


def _parts(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Outer sections first: the text config of a thinker is one level deeper than that of a plain model.
    parts = [(str(key), part) for key, part in config.items() if isinstance(part, dict)]
    yield from parts
    if depth < 3:
        for _, part in parts:
            yield from _parts(part, depth + 1)
