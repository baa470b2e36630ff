"""What a drift, its effects and the conclusions say on a terminal."""

import textwrap
from typing import TYPE_CHECKING

from affectlens.cli.printing import aligned, show

if TYPE_CHECKING:
    import pandas as pd

    from affectlens.drift import Drift
    from affectlens.effects import Effects

_ROLE = ("sites", "size", "frobenius", "relative", "rms", "changed", "control_relative")
_WIDTH = 100


def tell_drift(drift: "Drift", by: str = "tower,role") -> None:
    """Print what was compared, how far it moved by group, the ledger and the findings."""
    for source, who in drift.origin["sources"].items():
        print(
            f"{source:8} {who['name']}: {who['model_type']}, {who['parameters']:,} parameters, {who['dtype']}"
        )
    groups = [name.strip() for name in by.split(",")]
    frame = drift.by(by)
    moved = frame[frame["frobenius"] > 0]
    still = len(frame) - len(moved)
    print("\nHow far it moved: ‖Δ‖, ‖Δ‖/‖W_base‖, rms of Δ" + (f" ({still} groups did not)" if still else ""))
    show(moved, (*groups, *_ROLE))
    print("\nLedger: every parameter of both sides")
    show(drift.ledger)
    for finding in drift.findings:
        print(f"\n! {finding}")


def tell_effects(effects: "Effects", metric: str = "margin") -> None:
    """Print, for each task, what each group of sites does, beside its null and the control."""
    meaning = " = log p(gold) − log p(best other)" if metric == "margin" else ""
    print(f"\nWhat the change does to the {metric}{meaning}; 95 % intervals, and the share of the gain")
    ranks = effects.ranks(metric)
    for task, rows in effects.frame[effects.frame["metric"] == metric].groupby("task", sort=False):
        about = effects.origin["tasks"][task]
        fit = ", trained on: fit, not skill" if about["fit"] else ""
        print(f"\n{task}: {about['kind']}{fit}, n = {about['n']}, majority {about['majority']:.2f}")
        whole = effects.frame[(effects.frame["task"] == task) & (effects.frame["sites"] == "all")]
        for name, row in whole[whole["kind"] == "reference"].groupby("metric", sort=False):
            print(f"  {name}: base {row['baseline'].iloc[0]:.3f} → tuned {_value(row)}")
        here = ranks[ranks["task"] == task] if len(ranks) else ranks
        print(textwrap.indent(aligned(_HEAD, _lines(rows, here)), "  "))


_HEAD = ("sites", "transplant", "share", "revert", "share", "control's Δ", "zero", "null ≥ (of)")


def _lines(rows: "pd.DataFrame", ranks: "pd.DataFrame") -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(rows.loc[rows["kind"] != "random-control", "sites"]):
        group = rows[rows["sites"] == name]
        effect = group[group["kind"].isin(["effect", "reference"])]
        grown, reverted, zeroed = (effect[effect["action"] == a] for a in ("transplant", "revert", "zero"))
        control = group[group["kind"] == "control-tuning"]
        null = ranks[ranks["sites"] == name] if len(ranks) else ranks
        counts = null[["action", "at_least", "draws"]].itertuples(index=False, name=None)
        drawn = [f"{action[0]} {strong} ({draws})" for action, strong, draws in counts]
        cells = (_effect(grown), _share(grown), _effect(reverted), _share(reverted))
        lines.append((str(name), *cells, _effect(control), _effect(zeroed), ", ".join(drawn)))
    return lines


def _effect(rows: "pd.DataFrame") -> str:
    if rows.empty:
        return ""
    row = rows.iloc[0]
    return f"{row['effect']:+.2f} [{row['effect_low']:+.2f}, {row['effect_high']:+.2f}]"


def _share(rows: "pd.DataFrame") -> str:
    known = rows["recovered"].dropna()
    return f"{known.iloc[0]:.0%}" if len(known) else ""


def _value(rows: "pd.DataFrame") -> str:
    row = rows.iloc[0]
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def tell_conclusions(drift: "Drift", effects: "Effects") -> None:
    """Print the answer, what may be concluded and what may not."""
    from affectlens.views.conclusions import conclude

    found = conclude(drift, effects)
    print(f"\n{textwrap.fill(found.answer, _WIDTH)}")
    for title, sentences in (("May be concluded", found.may), ("May not be concluded", found.may_not)):
        print(f"\n{title}")
        for sentence in sentences:
            print(textwrap.fill(sentence, _WIDTH, initial_indent="  - ", subsequent_indent="    "))
