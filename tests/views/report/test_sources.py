"""Tables of different checkpoints are reported as such, and shown side by side."""

from collections.abc import Callable
from typing import Any

import pytest

from affectlens.drift.drift import Drift
from affectlens.effects.effects import Effects
from affectlens.views import Report, conclude

HEADER = {"header_sha256": "3f9a" * 16, "bytes": 3072}
WORDS = "The Drift and the Effects are not of the same checkpoints: they differ in tuned "
CASES = [
    # of the drift's tuned, of the effects' tuned, what is said
    ({"content_sha256": "a" * 64}, {"content_sha256": "b" * 64},
     "(content sha256 aaaaaaaa… and bbbbbbbb…)"),
    ({"content_sha256": "a" * 64, **HEADER}, {"content_sha256": "a" * 64, **HEADER, "bytes": 1}, ""),
    ({"content_sha256": "a" * 64, **HEADER}, {**HEADER, "header_sha256": "c" * 64},
     "(header sha256 3f9a3f9a… and cccccccc…)"),
    (HEADER, {**HEADER, "bytes": 4000}, "(3,072 and 4,000 bytes)"),
    (HEADER, HEADER, ""),
    (HEADER, {"bytes": 4000, "format": "memory"}, ""),
    ({}, {}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "words"), CASES)
def test_different_checkpoints_are_loud(
    make_drift: Callable[..., Drift],
    make_effects: Callable[..., Effects],
    ours: dict[str, Any],
    theirs: dict[str, Any],
    words: str,
) -> None:
    """Different hashes or sizes are reported; without a hash nothing is, and equal sides share a column."""
    drift, effects = make_drift(), make_effects({"o_proj": 0.4, "gate_proj": 0.2})
    drift.origin["sources"]["tuned"] = {"name": "one", **ours}
    effects.origin["sources"] = {"tuned": {"name": "two", **theirs}}
    html, found = Report(drift, effects).html, conclude(drift, effects)
    top = html.split("<h2>What was compared</h2>")[1][:400]

    assert bool(words) == ('<ul class="findings">' in top)
    assert bool(words) == (WORDS in top and words in top)
    assert bool(words) == found.may_not[0].startswith(WORDS + words)
    assert bool(words) == ("<th>tuned (Effects)</th>" in html)
