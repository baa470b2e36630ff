"""Tensor names that are code for a terminal, a page or a spreadsheet, or claim what no model has."""

from functools import partial
from pathlib import Path

import numpy as np

from tests.hostile.case import Case
from tests.hostile.writing import GATE, model, values

_LONG = "model." + "x" * 100_000 + ".weight"
# what the name is, the name, what must be printed of it as the first parameter that tuned alone has
_NAMES: tuple[tuple[str, str, str], ...] = (
    ("a script", "<script>alert(1)</script>", "<script>alert(1)</script>"),
    ("an image", '"><img src=x onerror=alert(1)>', "onerror=alert(1)"),
    ("colours", "\x1b[31mred\x1b[0m", "�[31mred"),
    ("a title", "\x1b]0;title\x07", "�]0;title�"),
    ("a screen that is cleared", "a\x1b[2J\x1b[Hb", "a�[2J�[Hb"),
    ("turned text", "model.\u202eevil\u202c.weight", "model.�evil�.weight"),
    ("zero-width characters", "model.\u200blay\u200ders.\ufeff", "model.�lay�ers.�"),
    ("a line break", "a\n! forged finding", "a"),
    ("a carriage return", "a\rb", "b"),
    ("a bell and a NUL", "a\x07\0b", "a��b"),
    ("a tab", "a\tb", "a"),
    ("a formula", "=cmd|' /C calc'!A0", "=cmd|"),
    ("a format", "%s%n{0.__class__}{}", "%s%n{0.__class__}{}"),
    ("a template", "{{7*7}}${jndi:ldap://x}", "{{7*7}}${jndi:ldap://x}"),
    ("a path", "../../etc/passwd", "../../etc/passwd"),
    ("two dots", "..", ".."),
    ("dots alone", "." * 50, "." * 50),
    ("a space", " ", "only-tuned"),
    ("nothing", "", "only-tuned"),
    ("a prototype", "__proto__", "__proto__"),
    ("a constructor", "constructor.prototype", "constructor.prototype"),
    ("a method", "__class__.__init__", "__class__.__init__"),
    ("100 kB", _LONG, "model.xxx"),
    ("a hundred thousand dots", "a." * 50_000 + "weight", "a.a.a"),
    ("a hundred marks", "a" + "\u0301" * 100, "a\u0301"),
    ("tags that nobody sees", "a" + "".join(chr(0xE0000 + ord(c)) for c in "evil"), "a�"),
    ("a private character", "a\ue000b", "a�b"),
    ("layer 10^9", "model.layers.1000000000.mlp.gate_proj.weight", "layers.1000000000"),
    ("layer 10^30", f"model.layers.{10**30}.mlp.gate_proj.weight", f"layers.{10**30}"),
    ("layer 999,999,999", "model.layers.999999999.mlp.gate_proj.weight", "layers.999999999"),
    ("layer of 300 digits", f"model.layers.{'9' * 300}.mlp.gate_proj.weight", "layers.999"),
    ("layer -1", "model.layers.-1.mlp.gate_proj.weight", "layers.-1"),
    ("layer of Arabic digits", "model.layers.\u0663.mlp.gate_proj.weight", "layers.\u0663"),
    ("layer of raised digits", "model.layers.\u00b2.mlp.gate_proj.weight", "layers.\u00b2"),
    ("layer 007", "model.layers.007.mlp.gate_proj.weight", "layers.007"),
    ("expert 10^18", f"model.layers.0.mlp.experts.{10**18}.gate_proj.weight", f"experts.{10**18}"),
    ("expert of 300 digits", f"model.layers.0.mlp.experts.{'9' * 300}.gate_proj.weight", "experts.999"),
    ("another case", GATE.upper(), GATE.upper()),
)  # fmt: skip


def _beside(root: Path, *, name: str) -> list[str]:
    tuned = {**values(seed=1), name: np.ones((16, 8), np.float32)}
    return ["diff", str(model(root / "base")), str(model(root / "tuned", tuned))]


def _compared(root: Path, *, name: str, verb: str) -> list[str]:
    """Use the name on both sides, so that it has a row of the table."""
    extra = {name: np.ones((16, 8), np.float32)}
    base = model(root / "base", {**values(), **extra})
    if verb == "inspect":
        return ["inspect", str(base), "--json"]
    tuned = model(root / "tuned", {**values(seed=1), name: 2 * extra[name]})
    output = str(root / "out" / "drift.csv")
    return ["diff", str(base), str(tuned), "--by", "site", "--detail", "neurons", "-o", output]


def _twins(root: Path, *, names: tuple[str, ...]) -> list[str]:
    twins = {name: np.full((16, 8), at, np.float32) for at, name in enumerate(names)}
    base, tuned = {**values(), **twins}, {**values(seed=1), **twins}
    return ["diff", str(model(root / "base", base)), str(model(root / "tuned", tuned))]


def _wrapped(root: Path) -> list[str]:
    """Use two names that differ only in a wrapper's prefix."""
    tensors = values()
    return ["inspect", str(model(root / "input", {**tensors, f"module.{GATE}": tensors[GATE]}))]


_ACCENTS = ("model.caf\u00e9.weight", "model.cafe\u0301.weight")
CASES: tuple[Case, ...] = (
    *(
        Case(f"name: {what}", "names", partial(_beside, name=name), "told", ("only-tuned", says))
        for what, name, says in _NAMES
    ),
    *(
        Case(
            f"name on both sides: {what}",
            "names",
            partial(_compared, name=name, verb="diff"),
            "told",
            ("paired",),
        )
        for what, name, _ in _NAMES
        if what.startswith(("a script", "colours", "a formula", "100 kB", "layer", "expert", "nothing"))
    ),
    *(
        Case(
            f"name as JSON: {what}",
            "names",
            partial(_compared, name=name, verb="inspect"),
            "told",
            ('"disk"',),
        )
        for what, name, _ in _NAMES
        if what.startswith(("colours", "turned", "layer 10^30", "expert of", "nothing", "a bell"))
    ),
    Case("names that differ by normalisation", "names", partial(_twins, names=_ACCENTS), "told", ("paired",)),
    Case(
        "names that differ by case",
        "names",
        partial(_twins, names=(GATE.title(), GATE.upper())),
        "told",
        ("paired",),
    ),
    Case(
        "names of one parameter", "names", _wrapped, "refused", (f"tensor 'module.{GATE}'", "same parameter")
    ),
)
