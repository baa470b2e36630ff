"""What a drift, its effects and the conclusions say on a terminal, as lines of text."""

import textwrap
from typing import TYPE_CHECKING

from affectlens.cli.printing import aligned, rows
from affectlens.html import plain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import pandas as pd

    from affectlens.drift import Drift
    from affectlens.effects import Effects

_ROLE = ("sites", "size", "frobenius", "relative", "rms", "changed", "control_relative", "aligned_relative")
_WIDTH = 100


def tell_drift(drift: "Drift", by: str = "tower,role") -> list[str]:
    """Say what was compared, how far it moved by group, the ledger and the findings."""
    groups = [name.strip() for name in by.split(",")]
    frame = drift.by(by)
    moved = frame[frame["frobenius"] > 0]
    still = f" ({len(frame) - len(moved)} groups did not)" if len(frame) > len(moved) else ""
    return [
        *(_source(side, who) for side, who in drift.origin["sources"].items()),
        "",
        f"How far it moved: ‖Δ‖, ‖Δ‖/‖W_base‖, rms of Δ{still}",
        *rows(moved, (*groups, *_ROLE)),
        "",
        "Ledger: every parameter of both sides",
        *rows(drift.ledger),
        *(f"! {plain(finding)}" for finding in drift.findings),
    ]


def _source(side: str, who: "Mapping[str, Any]") -> str:
    size = f"{who['parameters']:,} parameters, {who['dtype']}"
    return f"{side:8} {plain(who['name'])}: {plain(who['model_type'])}, {size}"


def tell_effects(effects: "Effects", metric: str = "margin") -> list[str]:
    """Say, for each task, what each group of sites does, beside its null and the control."""
    meaning = " = log p(gold) − log p(best other)" if metric == "margin" else ""
    lines = [f"! {plain(finding)}" for finding in effects.origin.get("findings", ())]
    lines += [f"What the change does to the {metric}{meaning}; 95 % intervals, share of the gain over base"]
    ranks = effects.ranks(metric)
    for task, group in effects.frame[effects.frame["metric"] == metric].groupby("task", sort=False):
        about = effects.origin["tasks"][task]
        fit = ", trained on: fit, not skill" if about["fit"] else ""
        kind = f"{about['kind']}{fit}, n = {about['n']}, majority {about['majority']:.2f}"
        lines += ["", f"{plain(task)}: {kind}"]
        whole = effects.frame[(effects.frame["task"] == task) & (effects.frame["kind"] == "reference")]
        for name, row in whole.groupby("metric", sort=False):
            lines.append(f"  {name}: base {row['baseline'].iloc[0]:.3f} → tuned {_value(row)}")
        here = ranks[ranks["task"] == task] if len(ranks) else ranks
        lines += textwrap.indent(aligned(_HEAD, _groups(group, here)), "  ").splitlines()
    return lines


_HEAD = ("sites", "transplant", "share", "revert", "share", "control's Δ", "zero", "null as strong")


def _groups(table: "pd.DataFrame", ranks: "pd.DataFrame") -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(table.loc[table["kind"] != "random-control", "sites"]):
        group = table[table["sites"] == name]
        effect = group[group["kind"].isin(["effect", "reference"])]
        grown, reverted, zeroed = (effect[effect["action"] == a] for a in ("transplant", "revert", "zero"))
        control = group[group["kind"] == "control-tuning"]
        null = ranks[ranks["sites"] == name] if len(ranks) else ranks
        counts = null[["action", "at_least", "draws"]].itertuples(index=False, name=None)
        drawn = [f"{action[0]} {strong}/{draws}" for action, strong, draws in counts]
        cells = (_effect(grown), _share(grown), _effect(reverted), _share(reverted))
        lines.append((str(name), *cells, _effect(control), _effect(zeroed), ", ".join(drawn)))
    return lines


def _effect(found: "pd.DataFrame") -> str:
    if found.empty:
        return ""
    row = found.iloc[0]
    return f"{row['effect']:+.2f} [{row['effect_low']:+.2f}, {row['effect_high']:+.2f}]"


def _share(found: "pd.DataFrame") -> str:
    known = found["recovered"].dropna()
    return f"{round(100 * known.iloc[0])}%" if len(known) else ""


def _value(found: "pd.DataFrame") -> str:
    row = found.iloc[0]
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def tell_conclusions(drift: "Drift", effects: "Effects") -> list[str]:
    """Say the answer, what may be concluded and what may not."""
    from affectlens.views.conclusions import conclude

    found = conclude(drift, effects)
    lines = [textwrap.fill(found.answer, _WIDTH)]
    for title, sentences in (("May be concluded", found.may), ("May not be concluded", found.may_not)):
        lines += ["", title]
        for sentence in sentences:
            lines.append(textwrap.fill(sentence, _WIDTH, initial_indent="  - ", subsequent_indent="    "))
    return lines
