"""Configs that no model could have: wrong types, absurd numbers, unknown model types."""

import json
from functools import partial
from pathlib import Path

from tests.hostile.case import Case
from tests.hostile.writing import CONFIG, model

# name, the whole text of config.json, what must be said
_TEXTS: tuple[tuple[str, str, str], ...] = (
    ("a list", "[]", "is not a JSON object"),
    ("null", "null", "is not a JSON object"),
    ("a number", "3", "is not a JSON object"),
    ("nothing", "", "is not valid JSON"),
    ("cut short", json.dumps(CONFIG)[:-5], "is not valid JSON"),
    ("Python", str(CONFIG), "is not valid JSON"),
    ("YAML", "model_type: llama\n", "is not valid JSON"),
    ("a web page", "<!DOCTYPE html><html></html>", "is not valid JSON"),
    ("bytes", "\udc80\udcff", "is not UTF-8 text"),
    ("UTF-16", "\udcff\udcfe" + "\0".join('{"a":1}'), "is not UTF-8 text"),
    ("a hundred sections deep", '{"a":' * 100 + "1" + "}" * 100, "nested more than 64 levels deep"),
    ("a thousand sections deep", '{"a":' * 960 + "1" + "}" * 960, "nested more than 64 levels deep"),
    (
        "a million lists deep",
        '{"a":' + "[" * 1_000_000 + "]" * 1_000_000 + "}",
        "is not valid JSON (a number is too long, or brackets",
    ),
    (
        "a number of 5,000 digits",
        '{"num_hidden_layers":' + "9" * 5000 + "}",
        "is not valid JSON (a number is too long, or brackets",
    ),
    ("five million numbers", '{"x":[' + "0," * 5_000_000 + "0]}", "more than 2,000,000 values"),
    ("70 MB", '{"x":"' + "x" * 70_000_000 + '"}', "larger than 64,000,000 bytes"),
)

# what is put in the place of each setting that is read
_ODD: tuple[object, ...] = (
    None, True, -1, 0, 10**9, 10**30, 0.5, float("nan"), float("inf"), "4", "", [], [4], {}, {"a": 1}, [[[]]]
)  # fmt: skip
_READ = (
    "model_type", "architectures", "num_attention_heads", "num_key_value_heads", "head_dim", "text_config",
    "vision_config", "attn_config", "tie_word_embeddings", "quantization_config", "auto_map", "multi_query",
    "new_decoder_architecture", "kv_lora_rank", "num_hidden_layers", "hidden_size", "_name_or_path",
)  # fmt: skip

_UNKNOWN = "parameters are recognised by names and shapes alone"
_REMOTE = {"AutoModel": "modeling_evil.Model", "AutoConfig": "other/repository--configuration.Config"}
_GROUPS = {"a": {"weights": {"block_structure": {}}}, "b": {"weights": [1]}, "c": 3}
# name, settings, what must be said on looking and on comparing
_TOLD: tuple[tuple[str, dict[str, object], str], ...] = (
    ("a type that nobody knows", {"model_type": "brand_new"}, f"'brand_new' is unknown: {_UNKNOWN}"),
    ("a type of 100 kB", {"model_type": "x" * 100_000}, f"its model_type is not a name: {_UNKNOWN}"),
    ("a list for a type", {"model_type": ["llama"]}, f"its model_type is not a name: {_UNKNOWN}"),
    ("a section for a type", {"model_type": {"a": 1}}, f"its model_type is not a name: {_UNKNOWN}"),
    ("a type with colours", {"model_type": "\x1b[31mllama\x1b[0m"}, "is unknown"),
    ("a type in markup", {"model_type": "<script>alert(1)</script>"}, "alert(1)</script>' is unknown"),
    ("a type with half a pair", {"model_type": "ll\ud800ma"}, "is unknown"),
    ("code of its own", {"auto_map": _REMOTE}, "remote code, which is not executed here"),
    ("code of its own, oddly", {"auto_map": [1]}, "remote code, which is not executed here"),
    ("an attention from a hub", {"attn_implementation": "stranger/kernels"}, "gate_proj"),
    ("10^9 layers", {"num_hidden_layers": 10**9}, "gate_proj"),
    ("10^30 heads", {"num_attention_heads": 10**30, "num_key_value_heads": 1}, "gate_proj"),
    ("negative heads", {"num_attention_heads": -2, "head_dim": -4}, "gate_proj"),
    ("no heads", {"num_attention_heads": 0, "num_key_value_heads": 0}, "gate_proj"),
    ("a quantization that is a list", {"quantization_config": [1]}, "the weights are quantized"),
    ("a quantization of odd blocks", {"quantization_config": {"weight_block_size": ["a", -1]}}, "quantized"),
    ("a quantization of odd groups", {"quantization_config": {"config_groups": _GROUPS}}, "are quantized"),
    ("100,000 sections", {f"s{n}": {} for n in range(100_000)}, "gate_proj"),
)  # fmt: skip


def _written(root: Path, *, whole: str, verb: str = "inspect") -> list[str]:
    """Write a model with this config; for a diff, on the tuned side."""
    folder = model(root / "input", seed=1)
    (folder / "config.json").write_bytes(whole.encode("utf-8", "surrogateescape"))
    if verb == "inspect":
        return [verb, str(folder)]
    return [verb, str(model(root / "base")), str(folder), "--detail", "heads,neurons", "--by", "role"]


def _set(root: Path, *, settings: dict[str, object], verb: str) -> list[str]:
    return _written(root, whole=json.dumps({**CONFIG, **settings}), verb=verb)


def _replaced(root: Path, *, odd: object, verb: str) -> list[str]:
    """Replace every setting that is read, at the top and in the section of each tower."""
    inner = dict.fromkeys(_READ, odd)
    sections = {"text_config": inner, "vision_config": inner} if odd == 10**30 else {}
    return _set(root, settings={**inner, **sections}, verb=verb)


def _case(name: str, build: partial[list[str]], says: str, *, told: bool) -> Case:
    shown = (says,) if told else ("config.json", says)
    return Case(f"config: {name}", "configs", build, "told" if told else "refused", shown)


CASES: tuple[Case, ...] = (
    *(_case(name, partial(_written, whole=whole), words, told=False) for name, whole, words in _TEXTS),
    *(
        _case(f"{name} ({verb})", partial(_set, settings=settings, verb=verb), words, told=True)
        for name, settings, words in _TOLD
        for verb in ("inspect", "diff")
    ),
    *(
        _case(f"{odd!r} everywhere ({verb})", partial(_replaced, odd=odd, verb=verb), "gate_proj", told=True)
        for odd in _ODD
        for verb in ("inspect", "diff")
    ),
)
