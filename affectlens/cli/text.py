"""What a drift, its effects and the conclusions say on a terminal, as lines of text."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from affectlens.printable import aligned, cell, plain, sentence

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import pandas as pd

    from affectlens.drift import Drift
    from affectlens.effects import Effects

_MUCH = 0.1  # a share of ‖Δ‖² that is worth a column
WIDTH = 100


def tell_drift(drift: "Drift", by: str = "tower,role") -> list[str]:
    """Say what was compared, what must not be overlooked, how far it moved by group, and the ledger."""
    groups = [name.strip() for name in by.split(",")]
    frame = drift.by(by)
    return [
        *(_source(side, who) for side, who in drift.origin["sources"].items()),
        *warned(drift.findings),
        "",
        f"How far it moved: ‖Δ‖, ‖Δ‖/‖W_base‖, rms of Δ{_others(frame)}",
        *_moved(frame[frame["frobenius"] != 0], groups),
        "",
        "Ledger: every parameter of both sides",
        *rows(drift.ledger),
    ]


def _others(frame: "pd.DataFrame") -> str:
    """How many groups have no row, and whether they could have moved."""
    beyond = int((frame["targeted"] == 0).sum())
    still = int((frame["frobenius"] == 0).sum()) - beyond
    counts = [(still, "did not"), (beyond, "could not: the tuning does not reach them")]
    told = [(count, words) for count, words in counts if count > 0]
    noun = "group" if told and told[0][0] == 1 else "groups"
    said = [f"{count} {f'{noun} ' if not at else ''}{words}" for at, (count, words) in enumerate(told)]
    return f" ({', '.join(said)})" if said else ""


def _moved(moved: "pd.DataFrame", groups: list[str]) -> list[str]:
    """The groups that moved, with the columns that say something of them, and what the rarer ones mean."""
    if moved.empty:
        return ["no group moved"]
    table = moved[[*groups, "sites", "size", "frobenius", "relative", "rms"]].copy()
    notes = []

    def add(name: str, cells: "pd.Series", note: str) -> None:
        table[name] = cells
        notes.append(f"{name}: {note}")

    if moved["changed"].notna().any():
        table["changed"] = moved["changed"]
    if "norms_known" in moved and (moved["norms_known"] < moved["sites"]).any():
        known = moved["norms_known"].fillna(moved["sites"]).astype(int)
        add("norms_known", known, "sites whose ‖W_base‖ was read; ‖Δ‖/‖W_base‖ is a ratio over these alone")
    if "rounding" in moved and ((casting := (moved["rounding"] / moved["frobenius"]) ** 2) >= _MUCH).any():
        shares = casting.where(casting >= _MUCH).clip(upper=1.0).map(_percent)
        add("rounding", shares, "share of ‖Δ‖² that casting to the stored dtype explains")
    if "control_relative" in moved:
        add("control", moved["control_relative"], "‖Δ‖/‖W_base‖ of the control")
    if "control_cosine" in moved:
        add("along", moved["control_cosine"].map(_percent), "share of Δ that lies along the control's")
    if "aligned_relative" in moved:
        aligned = moved["aligned_relative"].map("{:.4g}".format)
        if (moved["aligned_relative"].notna() & (aligned != moved["relative"].map("{:.4g}".format))).any():
            add("aligned", moved["aligned_relative"], "‖Δ‖/‖W_base‖ with the neurons matched first")
    return [*rows(table), *notes]


def _percent(share: float) -> str | None:
    return f"{round(100 * share)}%" if share == share else None


def _source(side: str, who: "Mapping[str, Any]") -> str:
    size = f"{who['parameters']:,} parameters, {plain(who['dtype'])}"
    return f"{side:8} {plain(who['name'])}: {plain(who['model_type'])}, {size}"


def tell_effects(effects: "Effects", metric: str = "margin") -> list[str]:
    """Say, for each task, what each group of sites does, beside its null and the control."""
    meaning = " = log p(gold) − log p(best other)" if metric == "margin" else ""
    lines = warned(effects.origin.get("findings", ()))
    lines += [f"What the change does to the {metric}{meaning}; 95 % intervals, share of the gain over base"]
    ranks = effects.ranks(metric)
    for task, group in effects.frame[effects.frame["metric"] == metric].groupby("task", sort=False):
        about = effects.origin["tasks"][task]
        fit = ", trained on: fit, not skill" if about["fit"] else ""
        kind = f"{plain(about['kind'])}{fit}, n = {about['n']}, majority {about['majority']:.2f}"
        lines += ["", f"{plain(task)}: {kind}"]
        whole = effects.frame[(effects.frame["task"] == task) & (effects.frame["kind"] == "reference")]
        for name, row in whole.groupby("metric", sort=False):
            lines.append(f"  {plain(name)}: base {row['baseline'].iloc[0]:.3f} → tuned {_value(row)}")
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
    from affectlens.views.sentences.conclusions import conclude

    found = conclude(drift, effects)
    lines = [textwrap.fill(found.answer, WIDTH)]
    for title, sentences in (("May be concluded", found.may), ("May not be concluded", found.may_not)):
        lines += ["", title]
        for one in sentences:
            lines.append(textwrap.fill(one, WIDTH, initial_indent="  - ", subsequent_indent="    "))
    return lines


def rows(frame: "pd.DataFrame", names: Sequence[str] = ()) -> list[str]:
    """Write the named columns of a frame (all by default) as aligned lines, a dash for null."""
    kept = [name for name in names or list(frame.columns) if name in frame]
    cells = [[cell(value) for value in row] for row in frame[kept].itertuples(index=False)]
    return aligned(kept, cells).splitlines()


def warned(findings: Iterable[object]) -> list[str]:
    """Write what must not be overlooked, each in full however long it is; each word as a name would be.

    >>> warned(["not\\x1b[31m the base"])
    ['! not�[31m the base']
    """
    words = (f"! {sentence(finding)}" for finding in findings)
    return [line for one in words for line in textwrap.wrap(one, WIDTH, subsequent_indent="  ")]
