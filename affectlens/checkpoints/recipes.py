"""What a low-rank adapter's files do not say by themselves: alpha, and how it scales B·A.

PEFT writes it into `adapter_config.json`. Checkpoints that hold bare trainables have it in the training
code alone; for those known in the field there is a preset.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from affectlens.errors import CheckpointError, near

# Alpha and rank as hard-coded by the training code of each.
PRESETS: Mapping[str, tuple[float, int]] = {
    "affectgpt": (32, 16),
    "emotion-llama": (16, 64),
    "llava-lora": (256, 128),
    "salmonn": (32, 8),
}
# Known by name too: their files say all that is needed.
PLAIN_PRESETS = ("blsp-emo", "emotion-qwen", "humanomni", "omni-thinker")
# Initialisations that move part of the base into the factors, so B·A is not the change.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Variants of LoRA whose change is not scale · B·A.
_VARIANTS = ("kasa_config", "use_bdlora", "monteclora_config", "velora_config", "use_qalora", "arrow_config")
_LONGEST, _MOST_STARS = 200, 4


@dataclass(frozen=True)
class Recipe:
    """How factors become a change: scale · B·A, with scale alpha/r or alpha/√r."""

    alpha: float | None = None
    rank: int | None = None  # that the factors must have, where it is known
    rooted: bool = False  # rank-stabilised: alpha/√r (arXiv 2312.03732)
    alphas: Mapping[str, float] = field(default_factory=dict)  # by pattern of module names
    dora: bool = False  # weight-decomposed (arXiv 2402.09353)
    note: str = ""  # what the caller should hear
    base: str = ""  # that the adapter names; it is compared, and never opened
    bare: frozenset[str] = frozenset()  # modules whose parameters are adapted without a module of their own

    def scale(self, module: str, rank: int) -> float | None:
        """The scale of one module; None where alpha is known to nobody."""
        matched = (a for pattern, a in self.alphas.items() if re.match(rf"(.*\.)?({pattern})$", module))
        alpha = next(matched, self.alpha)
        if alpha is None:
            return None
        return alpha / (math.sqrt(rank) if self.rooted else rank)


def recipe(name: str, config: Mapping[str, Any], *, preset: str | None, alpha: float | None) -> Recipe:
    """The recipe of an adapter: what its config says, and what that doesn't, the caller or the preset.

    Raises `CheckpointError` for adapters that are no LoRA, and for settings that can't be trusted.
    """
    known = preset_of(name, preset)
    if alpha is not None:
        known = Recipe(alpha=_finite(name, "alpha", alpha), rank=known.rank)
    if not config:
        return known
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        raise CheckpointError(
            name, f"a {kind[:40]} adapter, not LoRA", fix="Merge it into its base with PEFT first"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        fix = "Save it with path_initial_model_for_weight_conversion, which turns it into plain LoRA"
        raise CheckpointError(name, f"{start[:40]} moved part of the base into the factors", fix=fix)
    if config.get("layer_replication"):
        raise CheckpointError(name, "layer_replication: its layers are not those of the base")
    for variant in _VARIANTS:
        if config.get(variant):
            raise CheckpointError(
                name, f"{variant}: its change is not that of LoRA", fix="Merge it with PEFT first"
            )
    stated = _finite(name, "lora_alpha", config.get("lora_alpha"))
    ignored = stated is not None and alpha is not None and stated != alpha
    return Recipe(
        alpha=known.alpha if stated is None else stated,
        rooted=bool(config.get("use_rslora")),
        alphas=_patterns(name, config.get("alpha_pattern")),
        dora=bool(config.get("use_dora")),
        bare=_bare(config.get("target_parameters")),
        base=str(config.get("base_model_name_or_path") or ""),
        note=f"its config says alpha {stated:g}, so alpha={alpha:g} was not used" if ignored else "",
    )


def _bare(targets: Any) -> frozenset[str]:
    names = (name for name in targets if isinstance(name, str)) if isinstance(targets, list | set) else ()
    return frozenset(name.split(".")[-2] for name in names if "." in name)


def preset_of(name: str, preset: str | None) -> Recipe:
    """What a preset says; raises `CheckpointError` for one that is not known."""
    if preset is None or preset in PLAIN_PRESETS:
        return Recipe()
    if preset not in PRESETS:
        known = near(preset, sorted((*PRESETS, *PLAIN_PRESETS)))
        raise CheckpointError(name, f"no preset {preset!r}. Presets: {known}")
    alpha, rank = PRESETS[preset]
    return Recipe(alpha=alpha, rank=rank)


def _finite(name: str, what: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise CheckpointError(name, f"{what} is {json.dumps(value, default=str)[:40]}, not a number")
    return float(value)


def _patterns(name: str, stated: Any) -> dict[str, float]:
    """PEFT matches these as regular expressions; from a stranger one may take for ever."""
    found = {}
    if stated and not isinstance(stated, Mapping):
        raise CheckpointError(name, f"alpha_pattern is a {type(stated).__name__}, not patterns and numbers")
    for pattern, alpha in (stated or {}).items():
        try:
            re.compile(pattern)
            repeated = re.search(r"\)\s*[*+{?]", pattern) is not None
            unsafe = repeated or len(pattern) > _LONGEST or len(re.findall(r"[*+{]", pattern)) > _MOST_STARS
        except (re.error, TypeError):
            unsafe = True
        if unsafe:
            raise CheckpointError(
                name, f"alpha_pattern {str(pattern)[:60]!r} is not a pattern that is safe to match"
            )
        value = _finite(name, f"alpha_pattern {pattern!r}", alpha)
        if value is not None:
            found[pattern] = value
    return found
