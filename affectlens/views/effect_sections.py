"""The effects in the report: figures and numbers a metric, and the scores of the whole models a task."""

import math
from collections.abc import Sequence

from affectlens.effects.effects import Effects
from affectlens.html import plain
from affectlens.views.effect_panels import MAIN, effect_panels
from affectlens.views.fragments import folded, grid, section
from affectlens.views.outcome import Change, metrics, outcomes
from affectlens.views.page import figure
from affectlens.views.reading import Reading
from affectlens.views.wording import figure as digits
from affectlens.views.wording import percent, signed

FEW = 32  # rows up to which the table of numbers stands open


def effect_sections(effects: Effects) -> str:
    """Write what carried the change, metric by metric, then the scores of the whole models."""
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
    return section("What carries the change", *parts) + _scores(effects)


def _drawn(effects: Effects, metric: str, *, actions: Sequence[str]) -> str:
    caption = (
        f"Score ({plain(metric)}) after the change at one group of sites at a time, with 95 % intervals."
    )
    if "transplant" in actions:
        caption += " Transplant: how far from base towards tuned the group alone goes."
    if "revert" in actions:
        caption += " Revert: how far from tuned back towards base it falls when the group alone is set back."
    draws = effects.frame[effects.frame["kind"] == "random-control"]
    if draws["action"].isin(list(actions)).any():
        caption += " Ticks: draws of the null."
    return figure(effect_panels(effects, metric=metric, actions=actions), caption=caption)


def _numbers(effects: Effects, metric: str) -> str:
    ranks = effects.ranks(metric)
    header = ["task", "action", "sites", "parameters", "effect", "95 % interval", "share of gain",
              "null as strong", "control tuning", "its 95 % interval"]  # fmt: skip
    rows = [
        _line(Reading(one, ranks), change)
        for one in outcomes(effects, metric)
        for action in one.actions
        for change in one.changes(action)
    ]
    title = f"All numbers: {len(rows)} interventions"
    return folded(title, grid(header, rows, left=3), opened=len(rows) <= FEW)


def _line(reading: Reading, change: Change) -> list[object]:
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
                plain(one.task) + (" (fitted on)" if one.fitted else ""), plain(about.get("kind", "")),
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
