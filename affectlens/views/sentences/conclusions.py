"""Conclude: an answer, what may be concluded and what may not, each sentence derived from the numbers."""

from collections.abc import Iterator
from dataclasses import dataclass

from affectlens.drift.drift import Drift
from affectlens.effects.effects import Effects
from affectlens.errors import TableError
from affectlens.printable import plain
from affectlens.sites import MLP
from affectlens.views.readings.numbers import listed, percent
from affectlens.views.readings.of_effects import Outcome, Reading, metrics, outcomes
from affectlens.views.sentences.about_control import own_tasks
from affectlens.views.sentences.about_drift import about_drift, place
from affectlens.views.sentences.about_effects import about_effects
from affectlens.views.sentences.about_sources import findings, strangers
from affectlens.views.sentences.wording import RARE, Said, barred, joined

BRACKETS = "Square brackets show 95\N{NO-BREAK SPACE}% intervals, paired by example."


@dataclass(frozen=True)
class Conclusions:
    """A one-sentence answer, the sentences that the numbers support, and those that limit them."""

    answer: str
    may: tuple[str, ...]
    may_not: tuple[str, ...]

    def __str__(self) -> str:
        parts = [self.answer, BRACKETS]
        for title, sentences in (("May be concluded", self.may), ("May not be concluded", self.may_not)):
            parts += ["", title, *(f"- {sentence}" for sentence in sentences)]
        return "\n".join(parts)


def conclude(drift: Drift | None, effects: Effects | None = None) -> Conclusions:
    """Say what may and what may not be concluded from a drift and effects.

    Raises `TableError` if neither is given.
    """
    if drift is None and effects is None:
        raise TableError("nothing to conclude from: give a Drift, an Effects or both")
    readings = _readings(effects) if effects is not None else ()
    said = joined(
        [  # findings first: they can invalidate everything below them
            *_findings(drift, effects),
            *(about_effects(reading) for reading in readings),
            *own_tasks(readings),
            *([about_drift(drift)] if drift is not None else []),
            *(_metrics_disagree(effects, readings) if effects is not None else ()),
            *_limits(drift, effects, found=[reading.outcome for reading in readings]),
        ]
    )
    return Conclusions(_answer(drift, readings), said.may, said.may_not)


def _readings(effects: Effects) -> tuple[Reading, ...]:
    # Sentences on two metrics would repeat each other; `_metrics_disagree` reports where they differ.
    metric = metrics(effects)[0]
    ranks = effects.ranks(metric)
    return tuple(Reading(outcome, ranks) for outcome in outcomes(effects, metric))


def _findings(drift: Drift | None, effects: Effects | None) -> Iterator[Said]:
    tables = [table for table in (drift, effects) if table is not None]
    yield from (barred(words) for words in (*strangers(tables), *findings(tables)))


def _metrics_disagree(effects: Effects, readings: tuple[Reading, ...]) -> Iterator[Said]:
    for metric in metrics(effects)[1:]:
        ranks = effects.ranks(metric)
        for outcome in outcomes(effects, metric):
            ours = next((one for one in readings if one.outcome.task == outcome.task), None)
            theirs = Reading(outcome, ranks)
            one, two = ours and ours.best("transplant"), theirs.best("transplant")
            if (
                ours is None
                or not outcome.leading
                or not one
                or not two
                or not one.clear
                or one.group == two.group
            ):
                continue
            status = "leads" if not theirs.level(two) else "leads, though not clearly"
            status = status if two.clear else "leads, though its effect is not clear of zero"
            yield barred(
                f"which {ours.kind} leads depends on the metric: by {plain(metric)}, {two.name} {status}."
            ).of(ours.task)


def _limits(drift: Drift | None, effects: Effects | None, *, found: list[Outcome]) -> Iterator[Said]:
    yield barred(
        "This is one pair of checkpoints. The unit of replication is the training run, so everything here "
        "describes this pair; a claim about affect tuning needs several runs and their controls."
    )
    if drift is not None:
        yield barred(
            "Norms are not function: doubling up_proj and halving down_proj moves up_proj by 100 % and "
            "changes no output. A norm alone doesn't show which weights matter for behaviour."
        )
    if drift is not None and "control_frobenius" not in drift.frame:
        yield barred(
            "No control tuning was compared, so drift specific to affect can't be told from drift that any "
            "tuning causes."
        )
    if effects is not None and not (effects.frame["kind"] == "control-tuning").any():
        yield barred(
            "No control tuning was transplanted, so whether any effect here is specific to affect is unknown."
        )
    if any(_deleted(one) for one in found):
        yield barred(
            "Zeroing gate, up or down of a bias-free gated MLP deletes the whole MLP, so zero-ablation says "
            "nothing about the gate."
        )
    fitted = [plain(one.task) for one in found if one.fitted]
    if fitted:
        yield barred(
            f"{listed(fitted)}: the tuned model was trained on these examples, so the scores say nothing "
            "about new ones."
        )
    if effects is not None and effects.frame["recovered"].notna().any():
        yield barred("A share of the gain is a share of tuned minus base, not of the tuned model's score.")


def _deleted(one: Outcome) -> bool:
    return any(change.role in MLP for change in one.changes("zero"))


def _answer(drift: Drift | None, readings: tuple[Reading, ...]) -> str:
    parts = []
    if readings:
        parts.append(_behaviour(next((one for one in readings if one.outcome.headline), readings[0])))
    if drift is not None and (moved := place(drift)):
        parts.append(moved)
    words = "; ".join(parts) or "these tables single out no role"
    return words[0].upper() + words[1:] + "."


def _behaviour(reading: Reading) -> str:
    gain = reading.outcome.gain
    if gain is None or not gain.clear:
        return f"on {reading.task}, no effect of tuning was detected"
    best, gate = reading.best("transplant"), reading.gate
    if best is None or not best.clear:
        return f"on {reading.task}, no effect of any single {reading.kind} was detected"
    unknown = best.recovered != best.recovered
    share = "moves the score towards tuned" if unknown else f"recovers {percent(best.recovered)} of the gain"
    rank = reading.rank(best)
    null = ""
    if rank and rank[1] / rank[0] > RARE:
        null = f", though matched or exceeded by {rank[1]} of {rank[0]} null draws"
    level = reading.level(best)
    if gate is None or gate.group == best.group:
        most = f"more than any other {reading.kind} tried"
        order = f"though not clearly more than {reading.no_clearer(best)}" if level else most
        return f"on {reading.task}, {best.name} alone {share}, {order}{null}"
    theirs = "gate_proj" if gate.recovered != gate.recovered else f"gate_proj ({percent(gate.recovered)})"
    rivals = [name for name in level if name != gate.name]
    if gate.apart(best):
        order = f"more than {theirs}"
        order += f", though not clearly more than {listed(rivals, 'or')}" if rivals else ""
    else:
        order = f"not clearly more than {listed([theirs, *rivals], 'or')}"
    return f"on {reading.task}, {best.name} alone {share}, {order}{null}"
