"""The text that the command line prints of tables, conclusions and records, as lines."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from affectlens.printable import aligned, cell, plain, sentence

if TYPE_CHECKING:
    import pandas as pd

    from affectlens.drift import Drift
    from affectlens.effects import Effects

Record = Mapping[str, Any]  # parsed JSON
WIDTH = 100
_MUCH = 0.1  # the share of ‖Δ‖² from which rounding gets a column
_HEAD = ("sites", "transplant", "share", "revert", "share", "control's Δ", "zero", "null as strong")
_SETTINGS = ("alpha", "factor", "seed")  # of an intervention, in its record


def tell_drift(drift: "Drift", by: str = "tower,role") -> list[str]:
    """Return what was compared, the findings, how far each group moved, and the ledger."""
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
    """Return how many groups have no row, and whether they could have moved."""
    beyond = int((frame["targeted"] == 0).sum())
    still = int((frame["frobenius"] == 0).sum()) - beyond
    counts = [(still, "did not"), (beyond, "could not: the tuning does not reach them")]
    known = [(count, words) for count, words in counts if count > 0]
    noun = "group" if known and known[0][0] == 1 else "groups"
    parts = [f"{count} {f'{noun} ' if not at else ''}{words}" for at, (count, words) in enumerate(known)]
    return f" ({', '.join(parts)})" if parts else ""


def _moved(moved: "pd.DataFrame", groups: list[str]) -> list[str]:
    """Return the groups that moved, without columns that are empty, and the meaning of rare columns."""
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
        add("along", moved["control_cosine"].map(_percent), "share of Δ in the direction of the control")
    if "aligned_relative" in moved:
        aligned = moved["aligned_relative"].map("{:.4g}".format)
        if (moved["aligned_relative"].notna() & (aligned != moved["relative"].map("{:.4g}".format))).any():
            add("aligned", moved["aligned_relative"], "‖Δ‖/‖W_base‖ with the neurons matched first")
    return [*rows(table), *notes]


def _percent(share: float) -> str | None:
    return f"{round(100 * share)}%" if share == share else None


def _source(side: str, who: Record) -> str:
    size = f"{who['parameters']:,} parameters, {plain(who['dtype'])}"
    return f"{side:8} {plain(who['name'])}: {plain(who['model_type'])}, {size}"


def tell_effects(effects: "Effects", metric: str = "margin") -> list[str]:
    """Return, for each task, the effect of each group of sites, beside its null and the control."""
    from affectlens.tasks.scores import find_metric

    formula = find_metric(metric).formula
    meaning = f" = {formula}" if formula else ""
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
    """Return the answer, and what may and may not be concluded."""
    from affectlens.views.sentences.conclusions import conclude

    found = conclude(drift, effects)
    lines = [textwrap.fill(found.answer, WIDTH)]
    for title, sentences in (("May be concluded", found.may), ("May not be concluded", found.may_not)):
        lines += ["", title]
        for one in sentences:
            lines.append(textwrap.fill(one, WIDTH, initial_indent="  - ", subsequent_indent="    "))
    return lines


def tell_record(record: Record) -> list[str]:
    """Return what an edited checkpoint or an exported adapter consists of."""
    return _exported(record) if "adapter" in record else _edited(record)


def _edited(found: Record) -> list[str]:
    base, edited = found["base"], found["edited"]
    counts = [
        [role, *(f"{count[name]:,}" for name in ("sites", "parameters"))]
        for role, count in edited["roles"].items()
    ]
    share = edited["parameters"] / (base["parameters"] or 1)
    total = f"{edited['parameters']:,} of {base['parameters']:,} parameters ({share:.1%})"
    return [
        *(_step(step, base["name"]) for step in found["interventions"]),
        *aligned(("role", "sites", "parameters"), counts).splitlines(),
        f"{total}, in {edited['tensors']:,} tensors",
        *warned(found["notices"]),
        *_not_carried_over(found["not_carried_over"]),
    ]


def _step(step: Record, base: str) -> str:
    stated = ", ".join(
        f"{name} {step[name]:g}" for name in _SETTINGS if isinstance(step.get(name), int | float)
    )
    donor = f" from {plain(step['donor']['name'])}" if "donor" in step else ""
    return f"{step['intervention']} of {len(step['sites'])} sites{donor} in {plain(base)}" + (
        f": {stated}" if stated else ""
    )


def _not_carried_over(donors: dict[str, list[str]]) -> list[str]:
    return [
        line
        for donor, sentences in donors.items()
        if sentences
        for line in (f"Not carried over from {plain(donor)}:", *warned(sentences))
    ]


def _exported(found: Record) -> list[str]:
    adapter = found["adapter"]
    whole = f", {adapter['saved_whole']} modules saved whole" if adapter["saved_whole"] else ""
    names = f"{plain(found['source']['name'])} over {plain(found['base']['name'])}"
    return [
        f"PEFT adapter of {names}: {adapter['modules']} modules, {adapter['parameters']:,} parameters{whole}",
        *warned(f"left out: {name} ({why})" for name, why in found["left_out"].items()),
    ]


def rows(frame: "pd.DataFrame", names: Sequence[str] = ()) -> list[str]:
    """Return the named columns of a frame (all by default) as aligned lines, with a dash for null."""
    kept = [name for name in names or list(frame.columns) if name in frame]
    cells = [[cell(value) for value in row] for row in frame[kept].itertuples(index=False)]
    return aligned(kept, cells).splitlines()


def warned(findings: Iterable[object]) -> list[str]:
    """Return each finding in full, wrapped, after a `!`; control characters are replaced.

    >>> warned(["not\\x1b[31m the base"])
    ['! not�[31m the base']
    """
    words = (f"! {sentence(finding)}" for finding in findings)
    return [line for one in words for line in textwrap.wrap(one, WIDTH, subsequent_indent="  ")]
