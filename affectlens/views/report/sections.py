"""Write the sections on drift (map, roles, gate against up) and on effects (panels, numbers, scores)."""

import math
from collections.abc import Sequence

import pandas as pd

from affectlens.drift.drift import Drift
from affectlens.effects.effects import Effects
from affectlens.errors import NoSuchSite
from affectlens.printable import NULL, plain
from affectlens.views.figures.drift_map import drift_map
from affectlens.views.figures.effect_panels import MAIN, effect_panels
from affectlens.views.figures.norms import norm_contrast, role_bars
from affectlens.views.readings.numbers import NORMS, listed, percent, signed
from affectlens.views.readings.numbers import figure as digits
from affectlens.views.readings.of_drift import Moved, moved, unreached, unscaled
from affectlens.views.readings.of_effects import EffectRow, Reading, metrics, outcomes
from affectlens.views.report.page import figure, folded, grid, paragraph, section

TOP = 12  # rows shown if there is nothing to draw
FEW = 32  # with more rows, the table of numbers is folded


def drift_sections(drift: Drift) -> str:
    """Write what moved; without attention and feed-forward sites only the rows that moved most."""
    try:
        still = moved(drift).still
    except NoSuchSite:
        return _top(drift)
    if still:
        return _top(drift, "No attention or feed-forward weight of the language tower moved.")
    return _where(drift) + _roles(drift) + _contrast(drift)


def effect_sections(effects: Effects) -> str:
    """Write what each group of sites does, metric by metric, then the scores of the whole models."""
    parts = []
    for metric in metrics(effects):
        actions = [action for one in outcomes(effects, metric) for action in one.actions]
        main = [action for action in MAIN if action in actions]
        rest = [action for action in dict.fromkeys(actions) if action not in MAIN]
        parts += [_drawn(effects, metric, actions=main) if main else ""]
        parts += [
            folded(f"Also tried: {', '.join(map(plain, rest))}", _drawn(effects, metric, actions=rest))
            if rest
            else ""
        ]
        parts += [_numbers(effects, metric) if actions else ""]
    return section("Effects by group of sites", *parts) + _scores(effects)


def _top(drift: Drift, words: str = "") -> str:
    rows = drift.frame[drift.frame["frobenius"] > 0].sort_values("frobenius", ascending=False).head(TOP)
    columns = ["parameter", "size", "frobenius", "base_norm", "relative"]
    table = grid(columns, rows[columns].itertuples(index=False)) if len(rows) else ""
    words = words if len(rows) else "None of the compared weights moved."
    return section("What moved most", paragraph(words) if words else "", table)


def _where(drift: Drift) -> str:
    grey = unreached(drift)
    apart = f" Grey: the tuning could not reach {listed(grey)}." if grey else ""
    if unscaled(drift):
        apart += " No file states LoRA's alpha: multiply every value here by one unknown factor."
    caption = "Drift of the language tower by layer and role: ‖Δ‖ as a share of the norm of the base, ‖W‖."
    if "control_relative" in drift.frame:
        caption += " Right: the control tuning, on the same colour scale."
    if not drift.frame["layer"].notna().any():
        return ""
    return section("Where it moved", figure(drift_map(drift), caption=caption + apart))


def _roles(drift: Drift) -> str:
    sums = moved(drift)
    rows = sums.rows
    columns = _columns(sums)
    header = ["role", "sites", "parameters", "‖Δ‖", "‖W‖", *columns]
    table = pd.concat([rows[["role", "sites", "size", "frobenius", "base_norm"]], *columns.values()], axis=1)
    body = [
        [
            *row[:5],
            *(cell if isinstance(cell, str) else digits(cell) if cell == cell else NULL for cell in row[5:]),
        ]
        for row in table.itertuples(index=False, name=None)
    ]
    caption = (
        "How far each role moved, by two norms. The black lines show iid noise: the value expected if every "
        "weight changed by the same rms. Where a bar ends at its line, the norm doesn't distinguish "
        "the role's drift from noise, whatever the role does."
    )
    return section("Role by role", figure(role_bars(drift), caption=caption), grid(header, body))


def _columns(sums: Moved) -> dict[str, pd.Series]:
    """Return the columns on each role: the two norms, then what else is known and differs from them."""
    rows = sums.rows
    found = {
        "‖Δ‖/‖W‖ (%)": 100 * rows["relative"],
        "iid noise (%)": 100 * rows["noise_relative"],
        "rms": rows["rms"],
    }
    if sums.rounding:
        found["share of ‖Δ‖² from casting (%)"] = 100 * (rows["rounding"] / rows["frobenius"]) ** 2
    if "norms_known" in rows:
        found["‖W‖ known at"] = rows["norms_known"].fillna(rows["sites"]).map("{:.0f} sites".format)
    if "control_relative" in rows:
        found |= {"control ‖Δ‖/‖W‖ (%)": 100 * rows["control_relative"], "control rms": rows["control_rms"]}
    if "control_cosine" in rows:
        found["share of Δ along the control's (%)"] = 100 * rows["control_cosine"]
    if sums.realigned:
        found["‖Δ‖/‖W‖, neurons matched (%)"] = 100 * rows["aligned_relative"]
    return found


def _contrast(drift: Drift) -> str:
    try:
        rows = drift.contrast("gate_proj", "up_proj")
    except NoSuchSite:
        return ""
    if rows["ratio"].isna().all():
        return ""
    sides = [("tuned", "first_larger", "ratio"), ("iid noise", "noise_larger", "noise_ratio")]
    if "control_ratio" in rows:
        sides.append(("control", "control_larger", "control_ratio"))
    header = ["norm", *(f"{name}: {what}" for name, *_ in sides for what in ("ratio", "gate larger"))]
    body = []
    for row in rows.to_dict("records"):
        cells = [NORMS.get(str(row["norm"]), str(row["norm"]))]
        for _, larger, ratio in sides:
            cells += _compared(row[ratio], row[larger], layers=int(row["layers_known"]))
        body.append(cells)
    caption = (
        "gate_proj over up_proj, the cleanest contrast: same shape, same layers. Right of the line gate_proj "
        "moved more. A claim about the two needs every norm on the same side, away from iid noise and the "
        "control."
    )
    return section("Gate against up", figure(norm_contrast(drift), caption=caption), grid(header, body))


def _compared(ratio: float, larger: float, *, layers: int) -> list[str]:
    if math.isnan(ratio):
        return [NULL, NULL]
    # Noise in equal shapes gives equal norms; 'larger in 0 layers' would look as if up_proj were larger.
    return [digits(ratio, 4), "equal" if ratio == 1 and not larger else f"{int(larger)} of {layers}"]


def _drawn(effects: Effects, metric: str, *, actions: Sequence[str]) -> str:
    caption = f"Score ({plain(metric)}) after changing one group of sites at a time, with 95 % intervals."
    if "transplant" in actions:
        caption += " Transplant: the group's tuned weights in base; how far does it move towards tuned?"
    if "revert" in actions:
        caption += " Revert: the group's base weights in tuned; how far does it fall back towards base?"
    draws = effects.frame[effects.frame["kind"] == "random-control"]
    if draws["action"].isin(list(actions)).any():
        caption += " Ticks: null draws."
    return figure(effect_panels(effects, metric=metric, actions=actions), caption=caption)


def _numbers(effects: Effects, metric: str) -> str:
    ranks = effects.ranks(metric)
    header = ["task", "action", "sites", "parameters", "effect", "95 % interval", "share of gain",
              "null draws as strong", "control tuning", "its 95 % interval"]  # fmt: skip
    rows = [
        _line(Reading(one, ranks), change)
        for one in outcomes(effects, metric)
        for action in one.actions
        for change in one.changes(action)
    ]
    title = f"All numbers: {len(rows)} interventions"
    return folded(title, grid(header, rows, left=3), opened=len(rows) <= FEW)


def _line(reading: Reading, change: EffectRow) -> list[object]:
    control = reading.outcome.change(change.action, change.group, kind="control-tuning")
    rank = reading.rank(change)
    return [
        reading.task,
        plain(change.action),
        plain(change.group),
        None if math.isnan(change.size) else int(change.size),
        signed(change.effect),
        change.interval or "–",
        "–" if math.isnan(change.recovered) else percent(change.recovered),
        f"{rank[1]} of {rank[0]}" if rank else "–",
        signed(control.effect) if control else "–",
        (control.interval or "–") if control else "–",
    ]


def _scores(effects: Effects) -> str:
    rows: list[list[object]] = []
    for one in outcomes(effects):
        about = one.about
        majority = about.get("majority") if one.metric == "accuracy" else None
        for name, whole in (("tuned", one.gain), ("control", one.control)):
            if whole is None:
                continue
            rows.append([
                plain(one.task) + (" (trained on)" if one.fitted else ""), plain(about.get("kind", "")),
                plain(one.metric), name, about.get("n"),
                digits(whole.baseline), digits(whole.baseline + whole.effect),
                f"{signed(whole.effect)} ({whole.interval})" if whole.interval else signed(whole.effect),
                "–" if majority is None else digits(float(majority)),
            ])  # fmt: skip
    header = [
        "task",
        "kind",
        "metric",
        "model",
        "n",
        "base",
        "score",
        "change (95 % interval)",
        "majority label",
    ]
    return section("Scores of the whole models", grid(header, rows, left=4)) if rows else ""
