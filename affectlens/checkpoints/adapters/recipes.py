"""The scale of a low-rank adapter: alpha, and how it scales B·A.

PEFT writes alpha into `adapter_config.json`. For bare trainables only the training code has it, so the known
models of the field have a preset.
"""

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import regex

from affectlens.errors import CheckpointError, near, quoted
from affectlens.printable import plain

# Alpha and rank, as hard-coded in the training code of each model.
PRESETS: Mapping[str, tuple[float, int]] = {
    "affectgpt": (32, 16),
    "emotion-llama": (16, 64),
    "llava-lora": (256, 128),
    "salmonn": (32, 8),
}
# Accepted as presets too, though the files of these models say all that is needed.
PLAIN_PRESETS = ("blsp-emo", "emotion-qwen", "humanomni", "omni-thinker")
# Initialisations that move part of the base into the factors, so B·A is not the change.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Variants of LoRA whose change is not scale · B·A.
_VARIANTS = ("kasa_config", "use_bdlora", "monteclora_config", "velora_config", "use_qalora", "arrow_config")
_ACTIVATED = (
    "it is an activated LoRA (aLoRA): its change applies to tokens from its invocation tokens on, and to no "
    "others, so it can't be merged into the weights"
)
_MOST = 1e9  # bound of any number in a config; a larger one is a mistake, or malicious
_LONGEST = 1000  # characters of a pattern; PEFT makes patterns of module names, which have up to 200
_SECONDS = 2.0  # to match all patterns; 500 patterns on 500 names take one second


class ScaleRule(NamedTuple):
    """Alpha, rank and kind of scaling of one module."""

    alpha: float | None
    rank: float | None
    rooted: bool

    def scale(self, rank: int) -> float | None:
        """Return the scale of factors of this rank; None if alpha is unknown."""
        if self.alpha is None:
            return None
        return self.alpha / (math.sqrt(rank) if self.rooted else rank)


@dataclass(frozen=True)
class Recipe:
    """How factors become a change, scale · B·A: the scale is alpha/r or alpha/√r."""

    alpha: float | None = None
    rank: int | None = None  # the factors must have it, if it is known
    rooted: bool = False  # rank-stabilised: alpha/√r (arXiv 2312.03732)
    alphas: Mapping[str, float] = field(default_factory=dict)  # by pattern of module names
    ranks: Mapping[str, float] = field(default_factory=dict)  # the same
    dora: bool | None = None  # weight-decomposed (arXiv 2402.09353); None if the config doesn't say
    targets: frozenset[str] = frozenset()  # last parts of the listed module names
    layers: frozenset[str] = frozenset()  # numbers of the adapted layers; empty for all
    notes: tuple[str, ...] = ()  # for the user
    base: str = ""  # as the adapter names it; only compared, never opened
    parameters: tuple[str, ...] = ()  # adapted by themselves, such as stacked experts
    tokens: object = None  # whose rows are trained, as the config states them
    scales: Mapping[str, float] = field(default_factory=dict)  # of a live model: by the name of A, exact
    ties: bool = False  # factors of the output embedding are those of the input embedding

    @property
    def bare(self) -> frozenset[str]:
        """Modules whose own parameters are adapted."""
        parts = (name.split(".") for name in self.parameters)
        return frozenset(part[-2] if len(part) > 1 else "experts" for part in parts)

    def of(self, modules: Iterable[str], source: str) -> dict[str, "ScaleRule"]:
        """Return the scale rule of each module; raises `CheckpointError` for invalid or slow patterns."""
        names = list(modules)
        alphas = matched(self.alphas, names, source=source, what="alpha_pattern")
        ranks = matched(self.ranks, names, source=source, what="rank_pattern")
        return {
            name: ScaleRule(alphas.get(name, self.alpha), ranks.get(name, self.rank), self.rooted)
            for name in names
        }


def recipe(name: str, config: Mapping[str, Any], *, preset: str | None, alpha: float | None) -> Recipe:
    """Return the recipe of an adapter: from its config first, then from `alpha` or the preset.

    Raises `CheckpointError` for adapters that are not LoRA, and for invalid settings.
    """
    known = preset_of(name, preset)
    if alpha is not None:
        known = Recipe(alpha=_finite(name, "alpha", alpha), rank=known.rank)
    if not config:
        return known
    _plain(name, config)
    stated = _finite(name, "lora_alpha", config.get("lora_alpha"))
    ignored = stated is not None and alpha is not None and stated != alpha
    return Recipe(
        alpha=known.alpha if stated is None else stated,
        rank=_rank(name, config.get("r"), known.rank),
        rooted=bool(_flag(name, "use_rslora", config)),
        alphas=_patterns(name, "alpha_pattern", config),
        ranks=_patterns(name, "rank_pattern", config),
        dora=_flag(name, "use_dora", config),
        targets=frozenset(target.rpartition(".")[2] for target in _texts(config.get("target_modules"))),
        layers=_layers(config.get("layers_to_transform")),
        parameters=tuple(_texts(config.get("target_parameters"))),
        tokens=config.get("trainable_token_indices"),
        ties=config.get("ensure_weight_tying") is True,
        base=str(config.get("base_model_name_or_path") or ""),
        notes=(
            *((f"its config says alpha {stated:g}, so alpha={alpha:g} was not used",) if ignored else ()),
            *((_ACTIVATED,) if config.get("alora_invocation_tokens") else ()),
        ),
    )


def preset_of(name: str, preset: str | None) -> Recipe:
    """Return the recipe of a preset; raises `CheckpointError` for an unknown one."""
    if preset is None or preset in PLAIN_PRESETS:
        return Recipe()
    if preset not in PRESETS:
        known = near(preset, sorted((*PRESETS, *PLAIN_PRESETS)))
        raise CheckpointError(name, f"unknown preset {preset!r}. Presets: {known}")
    alpha, rank = PRESETS[preset]
    return Recipe(alpha=alpha, rank=rank)


def matched(
    patterns: Mapping[str, float], modules: Iterable[str], *, source: str, what: str
) -> dict[str, float]:
    """Map each module to the value of the first pattern that matches its name or the end of it, as in PEFT.

    `what` is the setting that has the patterns. Raises `CheckpointError` if matching takes too long.
    """
    left, until = dict.fromkeys(modules), time.monotonic() + _SECONDS
    found = {}
    for pattern, value in patterns.items():
        compiled = _compiled(pattern, source, what)
        for module in list(left):
            try:
                if compiled.match(module, timeout=max(until - time.monotonic(), 0.001)):
                    found[module] = value
                    del left[module]
            except TimeoutError:
                reason = f"{what} {quoted(pattern)} takes too long to match"
                raise CheckpointError(source, reason, fix="Write out the names of the modules") from None
    return found


def _plain(name: str, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless the adapter changes the parameters it names by scale · B·A."""
    kind = config.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind.rpartition(".")[2] != "LORA":
        reason = f"a {quoted(kind)} adapter, not LoRA"
        raise CheckpointError(name, reason, fix="Merge it into its base with PEFT first")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        fix = "Save it with path_initial_model_for_weight_conversion, which turns it into plain LoRA"
        raise CheckpointError(name, f"{quoted(start)} moved part of the base into the factors", fix=fix)
    if config.get("layer_replication"):
        raise CheckpointError(name, "layer_replication: its layers are not those of the base")
    for variant in _VARIANTS:
        if config.get(variant):
            raise CheckpointError(
                name,
                f"{variant}: it changes weights in another way than LoRA",
                fix="Merge it with PEFT first",
            )


def _layers(stated: object) -> frozenset[str]:
    numbers = stated if isinstance(stated, list | tuple | set) else [stated]
    return frozenset(str(number) for number in numbers if type(number) is int)


def _texts(listed: object) -> Iterator[str]:
    """Yield the names in a list; a single string is skipped: a regular expression, or "all-linear"."""
    if isinstance(listed, list | tuple | set):
        yield from (name for name in listed if isinstance(name, str))


def _finite(name: str, what: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST:
        reason = f"{what} must be a number between -{_MOST:,.0f} and {_MOST:,.0f}, got {_shown(value)}"
        raise CheckpointError(name, reason)
    return float(value)


def _flag(name: str, what: str, config: Mapping[str, Any]) -> bool | None:
    value = config.get(what)
    if not isinstance(value, bool | None):
        raise CheckpointError(name, f"{what} must be true or false, got {_shown(value)}")
    return value


def _rank(name: str, stated: object, known: int | None) -> int | None:
    if stated is None:
        return known
    if type(stated) is not int or not 0 < stated < _MOST:
        raise CheckpointError(
            name, f"r must be a whole number between 1 and {_MOST:,.0f}, got {_shown(stated)}"
        )
    return stated


def _shown(value: object) -> str:
    return quoted(value) if isinstance(value, str) else plain(value, 40)


def _patterns(name: str, what: str, config: Mapping[str, Any]) -> dict[str, float]:
    stated = config.get(what)
    if stated and not isinstance(stated, Mapping):
        raise CheckpointError(name, f"{what} must map patterns to numbers, got {type(stated).__name__}")
    found = {pattern: _finite(name, what, value) for pattern, value in (stated or {}).items()}
    return {pattern: value for pattern, value in found.items() if value is not None}


def _compiled(pattern: str, source: str, what: str) -> regex.Pattern[str]:
    try:
        if len(pattern) > _LONGEST:
            raise ValueError
        re.compile(pattern)  # rejects what only `regex` knows, such as recursion: PEFT uses `re`
        return regex.compile(rf"(.*\.)?({pattern})$")
    except (re.error, regex.error, ValueError, OverflowError, RecursionError):
        raise CheckpointError(source, f"{what} {quoted(pattern)} is not a valid pattern") from None
