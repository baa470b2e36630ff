"""Canonical names: the name of a parameter in memory under transformers, whatever its name in the file.

Training frameworks add prefixes, and releases of transformers save one model with different paths. For the
model types that transformers knows, `conversions.json` lists its own renamings as regular expressions
(`python -m benchmarks.conversions` writes it); the layouts of other models are recognised by their parts.
Only strings are rewritten, no model or config is built.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

# Prefixes that a wrapper of the model adds, and infixes that a wrapper of its modules adds (DDP, FSDP, PEFT).
_WRAPPERS = re.compile(r"^(?:(?:module|llama_model)\.)+(?=.*\.)")
_WRAPPED = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|base_model\.model"
    r"|base_layer|token_adapter|(?:modules_to_save|original_module)(?:\.default)?)\."
)
_PARTS = r"(?:visual|vision_tower|audio_tower|multi_modal_projector|language_model)\."
_LONGEST, _DEEPEST = 400, 40  # characters and parts of a name; matching longer ones takes too long
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MULTIMODAL = re.compile(rf"^(?:model\.)?{_PARTS}")
# For model types that transformers does not know; applied in this order, each to the result of the last.
_LAYOUT = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
        (rf"^({_PARTS})", r"model.\1"),
        (r"^(model\.(?:vision_tower|audio_tower)\.)(?:vision_model|audio_model)\.", r"\1"),
    )
)
# The number of a layer or expert in ASCII digits; a longer one does not fit into the tables of results.
INDEX = r"[0-9]{1,9}"


class Renaming(NamedTuple):
    """One renaming of transformers: below the path `scope`, `put` replaces the first match of `find`."""

    scope: str | None
    base: str | None  # a prefix of the scope that a file may lack
    find: re.Pattern[str]
    put: str
    guard: re.Pattern[str] | None  # the renaming applies only to files where a name matches this

    def rename(self, name: str) -> str:
        """Rename a parameter, or return its name unchanged."""
        scope = f"{self.scope}." if self.scope else ""
        prefix = f"{self.base}.{scope}" if self.base else scope
        if self.scope is None:
            prefix = ""
        elif not name.startswith(prefix):
            prefix = scope
        if not name.startswith(prefix):
            return name
        below = name[len(prefix) :]  # without the prefix, so that `^` matches where the scope begins
        match = self.find.search(below)
        if match is None:
            return name
        return prefix + below[: match.start()] + match.expand(self.put) + below[match.end() :]


class Known(NamedTuple):
    """The entries of `conversions.json` for an architecture."""

    rules: tuple[Renaming, ...]
    kept: frozenset[str]  # names in memory, with N for numbers, which the rules for files would rename


def canonical(names: Iterable[str], config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Map each name to its canonical name; `config` is the model's `config.json`, if there is one.

    >>> canonical(["language_model.model.norm.weight", "vision_tower.post_layernorm.bias"])
    {'language_model.model.norm.weight': 'model.language_model.norm.weight', \
'vision_tower.post_layernorm.bias': 'model.vision_tower.post_layernorm.bias'}
    """
    bare = {name: bare_name(name) for name in names}
    known = _known(config or {})
    if known is None:
        multimodal = any(_MULTIMODAL.match(name) for name in bare.values())
        return {name: _in_memory(stripped) if multimodal else stripped for name, stripped in bare.items()}
    active = [r for r in known.rules if r.guard is None or any(map(r.guard.search, bare.values()))]
    for name, stripped in bare.items():
        if is_name(name) and NUMBER.sub("N", stripped) not in known.kept:
            for rule in active:
                stripped = rule.rename(stripped)
            bare[name] = stripped
    return bare


def is_name(name: str) -> bool:
    """Return False for a string that is too long for a name, and for regular expressions."""
    return len(name) <= _LONGEST and name.count(".") < _DEEPEST


def bare_name(name: str) -> str:
    """Remove the prefixes and infixes that wrappers add.

    >>> bare_name("module._fsdp_wrapped_module.model.norm.weight")
    'model.norm.weight'
    """
    if not is_name(name):
        return name
    before = None
    while before != name:  # wrappers are nested
        before, name = name, _WRAPPED.sub("", _WRAPPERS.sub("", name))
    return name


def stacked(model_type: str) -> frozenset[str]:
    """Return the parameters that hold all experts of a layer in transformers' model of this type."""
    return frozenset(_table()["stacked"].get(model_type, ()))


def recognised(config: Mapping[str, Any]) -> bool:
    """Return True if transformers has a model of this config's type, so that its names are unambiguous."""
    return _known(config) is not None


def compiled(row: Sequence[Any]) -> Renaming:
    """Compile a row of `conversions.json`."""
    scope, base, find, put, guard = row
    return Renaming(scope, base, re.compile(find), put, re.compile(guard) if guard else None)


def words(alternatives: str) -> str:
    r"""Write a regular expression that matches any of these words.

    >>> words("gate_proj w[13] \\w+_gate")
    '(?:gate_proj|w[13]|\\w+_gate)'
    """
    return f"(?:{'|'.join(alternatives.split())})"


def _in_memory(name: str) -> str:
    for pattern, replacement in _LAYOUT:
        name = pattern.sub(replacement, name)
    return name


def _known(config: Mapping[str, Any]) -> Known | None:
    """Look up a config's architecture; None if transformers does not know it."""
    table = _table()
    kind, names = config.get("model_type"), config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    # Remote code may give another model a type that transformers knows.
    if not isinstance(kind, str) or config.get("auto_map"):
        return None
    numbers = table["classes"].get(name) if isinstance(name, str) else None
    if numbers is None:
        numbers = table["types"].get(kind)
    if numbers is None and kind not in table["known"]:
        return None
    rows = (*(table["rules"][n] for n in numbers or ()), *table["legacy"])
    return Known(tuple(compiled(row) for row in rows), frozenset(table["kept"].get(kind, ())))


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        files("affectlens.sites").joinpath("conversions.json").read_text("utf-8")
    )
    return found
