"""Invalid adapter configs: numbers that are none, adapters that are not LoRA, endless patterns."""

EVIL = "([a-z._0-9]|[a-z]|\\w)+[0-9]"  # takes for ever on the name of any module
_NUMBER = "must be a number between -1,000,000,000 and 1,000,000,000, got "
_RANK = "r must be a whole number between 1 and 1,000,000,000, got "
# name, settings that differ, what must be said
CONFIGS: tuple[tuple[str, dict[str, object], str], ...] = (
    ("alpha is NaN", {"lora_alpha": float("nan")}, f"lora_alpha {_NUMBER}nan"),
    ("alpha is endless", {"lora_alpha": float("inf")}, f"lora_alpha {_NUMBER}inf"),
    ("alpha is text", {"lora_alpha": "16"}, f"lora_alpha {_NUMBER}'16'"),
    ("alpha is a list", {"lora_alpha": [16]}, f"lora_alpha {_NUMBER}[16]"),
    ("alpha is true", {"lora_alpha": True}, f"lora_alpha {_NUMBER}True"),
    ("alpha has 300 digits", {"lora_alpha": 10**300}, "must be a number between"),
    ("rank is zero", {"r": 0}, f"{_RANK}0"),
    ("rank is negative", {"r": -2}, f"{_RANK}-2"),
    ("rank is text", {"r": "2"}, f"{_RANK}'2'"),
    ("rank is a fraction", {"r": 2.5}, f"{_RANK}2.5"),
    ("rank is true", {"r": True}, f"{_RANK}True"),
    ("rank is a section", {"r": {"a": [1]}}, "r must be a whole number between"),
    ("rank has 300 digits", {"r": 10**300}, "r must be a whole number between"),
    (
        "rank is another than that of the factors",
        {"r": 8},
        "its factors have rank 2, but its config or the preset says 8",
    ),
    (
        "a pattern says another rank",
        {"rank_pattern": {"up_proj": 4}},
        "its factors have rank 2, but its config or the preset says 4",
    ),
    ("a pattern's rank is text", {"rank_pattern": {"up_proj": "4"}}, f"rank_pattern {_NUMBER}'4'"),
    (
        "patterns are a list",
        {"alpha_pattern": ["a"]},
        "alpha_pattern must map patterns to numbers, got list",
    ),
    (
        "patterns are text",
        {"rank_pattern": "gate_proj"},
        "rank_pattern must map patterns to numbers, got str",
    ),
    (
        "a pattern's alpha is NaN",
        {"alpha_pattern": {"up_proj": float("nan")}},
        "alpha_pattern must be a number",
    ),
    ("a pattern that takes for ever", {"alpha_pattern": {EVIL: 3}}, "takes too long to match"),
    ("a rank's pattern that takes for ever", {"rank_pattern": {EVIL: 3}}, "takes too long to match"),
    ("a pattern that is none", {"alpha_pattern": {"(": 3}}, "alpha_pattern '(' is not a valid pattern"),
    ("a pattern that recurs", {"alpha_pattern": {"(?R)": 3}}, "is not a valid pattern"),
    ("a pattern of 100 kB", {"alpha_pattern": {"a" * 100_000: 3}}, "is not a valid pattern"),
    ("a pattern of brackets", {"alpha_pattern": {"(" * 450 + ")" * 450: 3}}, "is not a valid pattern"),
    ("another kind", {"peft_type": "IA3"}, "a 'IA3' adapter, not LoRA"),
    ("an unknown kind", {"peft_type": "\x1b[31mEVIL"}, "adapter, not LoRA"),
    ("a list for a kind", {"peft_type": ["LORA"]}, "adapter, not LoRA"),
    (
        "a part of the base is in the factors",
        {"init_lora_weights": "pissa"},
        "'pissa' moved part of the base",
    ),
    (
        "layers are replicated",
        {"layer_replication": [[0, 10**9]]},
        "layer_replication: its layers are not those",
    ),
    ("a variant", {"use_qalora": True}, "use_qalora: it changes weights in another way than LoRA"),
    ("DoRA without magnitudes", {"use_dora": True}, "DoRA without its magnitude vector"),
    ("alpha is huge", {"lora_alpha": 1e300}, f"lora_alpha {_NUMBER}1e+300"),
    ("rank is NaN", {"r": float("nan")}, f"{_RANK}nan"),
    ("DoRA is text", {"use_dora": "false"}, "use_dora must be true or false, got 'false'"),
    ("DoRA is a list", {"use_dora": [True]}, "use_dora must be true or false, got [True]"),
    ("a root is text", {"use_rslora": "no"}, "use_rslora must be true or false, got 'no'"),
    ("a root is a number", {"use_rslora": 1}, "use_rslora must be true or false, got 1"),
    (
        "a rank's pattern that is none",
        {"rank_pattern": {"(((": 2}},
        "rank_pattern '(((' is not a valid pattern",
    ),
)
# name, text of adapter_config.json, what must be said
TEXTS: tuple[tuple[str, str, str], ...] = (
    ("a list", "[]", "adapter_config.json: is not a JSON object"),
    ("nothing", "", "adapter_config.json: is not valid JSON"),
    ("brackets", "[" * 100_000, "adapter_config.json: is not valid JSON"),
    ("a hundred sections deep", '{"r":' * 100 + "2" + "}" * 100, "nested more than 64 levels deep"),
    ("two ranks", '{"peft_type":"LORA","r":2,"r":4}', "has the key 'r' twice"),
    ("alpha of 1e400", '{"peft_type":"LORA","r":2,"lora_alpha":1e400}', f"lora_alpha {_NUMBER}inf"),
)
