"""Say what the drift shows: which role moved most under which norm, and whether noise alone explains it."""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from affectlens.drift.drift import Drift
from affectlens.errors import NoSuchSite
from affectlens.views.readings.numbers import NORMS, between, figure, listed, percent
from affectlens.views.readings.of_drift import ROLES, Moved, moved, reached, unreached, unscaled
from affectlens.views.sentences.wording import Said, allowed, barred, joined

LEADING = ("relative", "frobenius", "rms")
LITTLE = 0.05  # so near to one, a ratio is "a little more"; so near to the control's, "nearly the same"


def about_drift(drift: Drift) -> Said:
    """Say which role moved most under which norm, and compare gate with up, iid noise and the control."""
    try:
        sums = moved(drift)
    except NoSuchSite:
        return _none(drift)
    if sums.still:
        if _compared(drift):
            return barred(
                "The compared attention and feed-forward weights of the language tower did not move at all; "
                "the ledger lists what was not compared."
            )
        return barred(
            "The attention and feed-forward weights of the language tower did not move at all, so no change "
            "of behaviour comes from them."
        )
    vague = unscaled(drift)
    leading = [*_leaders(sums, vague=vague), *_spread(sums, vague=vague)]
    return joined([*leading, *_weakened(sums), *_gate_and_up(drift), *_untargeted(drift)])


def place(drift: Drift) -> str:
    """Say in a clause which role moved most by the relative norm, for the report's answer."""
    try:
        sums = moved(drift)
    except NoSuchSite:
        return ""
    if sums.still:
        return f"no {_compared(drift)}attention or feed-forward weight of the language tower moved"
    first = sums.leaders("relative")
    if not first:
        return ""
    rivals = _same(sums, "relative", role=first[0])
    also = f", and also leads under {listed(rivals)}" if rivals else ""
    return f"by ‖Δ‖/‖W‖, {first[0]} moved most{also}"


def _compared(drift: Drift) -> str:
    """Return the word that limits a sentence to the compared weights, if others were not compared."""
    left_out = {"only-base", "only-tuned", "reshaped", "skipped"}
    return "compared " if left_out & set(drift.ledger["state"]) else ""


def _none(drift: Drift) -> Said:
    frame = drift.frame[(drift.frame["tower"] == "language") & drift.frame["role"].isin(ROLES)]
    if len(frame) and not any(reached(frame)):
        return barred(
            "The tuning could not reach any attention or feed-forward weight of the language tower: that "
            "none of them moved is a choice of the set-up, not a finding."
        )
    return barred(
        "No attention or feed-forward weight of the language tower was compared, so the table "
        "can't say which of them moved."
    )


def _leaders(sums: Moved, *, vague: bool) -> Iterator[Said]:
    seen: dict[str, list[str]] = {}
    for norm in LEADING:
        values = sums.column(norm)
        leaders = sums.leaders(norm)
        if not leaders or len(values) < 2:
            continue
        role = leaders[0]
        seen.setdefault(role, []).append(NORMS[norm])
        second = max((other for other in values if other != role), key=values.__getitem__)
        write = _percent if norm == "relative" else figure
        words = f"{write(values[role])}; next {second}, {write(values[second])}"
        if vague:  # every value has the same unknown factor, which cancels in a ratio
            words = f"the next, {second}, did not move"
            if values[second]:
                words = f"{figure(values[role] / values[second])} times as far as {second}, the next"
        yield allowed(f"By {NORMS[norm]}, {role} moved most ({words}).")
        if rivals := _same(sums, norm, role=role):
            yield barred(
                f"That {role} leads by {NORMS[norm]} is no evidence for a link to affect: it also leads "
                f"under {listed(rivals)}."
            )
    if len(seen) > 1:
        each = "; ".join(f"{role} by {listed(norms)}" for role, norms in seen.items())
        yield barred(f"Which role moved most depends on the norm: {each}.")


def _percent(share: float) -> str:
    # `percent` rounds to whole numbers, but roles often differ in the third digit only.
    return f"{figure(100 * share)}\N{NO-BREAK SPACE}%"


def _same(sums: Moved, norm: str, *, role: str) -> list[str]:
    rivals = {"noise_": "iid noise", "control_": "the control tuning"}
    found = []
    for prefix, words in rivals.items():
        leaders = sums.leaders(prefix + norm)
        if role in leaders:
            others = [other for other in leaders if other != role]
            found.append(f"{words} (tied with {listed(others)})" if others else words)
    return found


def _spread(sums: Moved, *, vague: bool) -> Iterator[Said]:
    rms = sums.column("rms")
    if len(rms) > 2 and min(rms.values()) > 0 and max(rms.values()) < 1.5 * min(rms.values()):
        spread = between(list(rms.values()))
        if vague:
            spread = f"within a factor of {figure(max(rms.values()) / min(rms.values()))}"
        yield allowed(
            f"All {len(rms)} roles moved by a similar rms ({spread}), as is usual under an adaptive "
            "optimiser such as AdamW."
        )


def _weakened(sums: Moved) -> Iterator[Said]:
    """Say what weakens the norms: a large share of rounding, and base norms that were not read."""
    if sums.rounding:
        each = listed(f"{percent(share)} ({role})" for role, share in sums.rounding.items())
        yield barred(
            f"Casting to the dtype of tuned alone explains {each} of ‖Δ‖²: at most the rest is due to the "
            "tuning."
        )
    rows = sums.rows
    if "norms_known" not in rows:
        return
    known, sites = int(rows["norms_known"].fillna(rows["sites"]).sum()), int(rows["sites"].sum())
    if known < sites:
        yield barred(
            f"The norm of the base was read at {known} of these {sites} sites, so ‖Δ‖/‖W‖ of a role covers "
            "only those (detail='exact' reads the others)."
        )


def _gate_and_up(drift: Drift) -> Iterator[Said]:
    try:
        rows = drift.contrast("gate_proj", "up_proj")
    except NoSuchSite:
        return
    known = rows[rows["ratio"].notna()].set_index("norm")
    if known.empty:
        return
    yield _direction(known)
    if "relative" in known.index:
        yield _against_rivals(known.to_dict("index")["relative"])
    if "control_ratio" in known:
        yield from _against_control(known[known["control_ratio"].notna()])


def _direction(known: pd.DataFrame) -> Said:
    ratios = {str(norm): float(ratio) for norm, ratio in known["ratio"].items()}
    above = [NORMS[norm] for norm, ratio in ratios.items() if ratio > 1]
    below = [NORMS[norm] for norm, ratio in ratios.items() if ratio <= 1]
    span = f"median ratios over {int(known['layers_known'].max())} layers: {between(list(ratios.values()))}"
    few = len(ratios) < len(NORMS)
    every = f"by {listed(above or below)} (the other norms are unknown)" if few else "under every norm"
    if not below:
        little = "a little " if max(ratios.values()) < 1 + LITTLE else ""
        return allowed(f"gate_proj moved {little}more than up_proj {every} ({span}).")
    if not above:
        every = every if few else "under any norm"
        return allowed(f"gate_proj did not move more than up_proj {every} ({span}).")
    return barred(
        f"Whether gate_proj moved more than up_proj depends on the norm: it did by {listed(above)}, but "
        f"not by {listed(below)} ({span})."
    )


def _against_rivals(row: dict[Any, Any]) -> Said:
    ratio, noise, control = row["ratio"], row["noise_ratio"], row.get("control_ratio", math.nan)
    beside = f"under iid noise in {row['noise_larger']:.0f} (ratio {figure(noise, 4)})"
    counts = (
        f"By ‖Δ‖/‖W‖, gate_proj moved more than up_proj in {int(row['first_larger'])} of "
        f"{int(row['layers_known'])} layers (median ratio {figure(ratio, 4)}), "
        f"{'under iid noise in an unknown number' if math.isnan(noise) else beside}"
    )
    if ratio <= 1:
        return barred(f"{counts}: no lead by this norm.")
    if math.isnan(noise):
        return barred(f"{counts}, so whether noise explains this lead is unknown.")
    if ratio <= noise:
        return barred(f"{counts}, so this lead is no evidence for the gate.")
    if ratio <= control * (1 + LITTLE):
        return barred(
            f"{counts}, under the control tuning in {int(row['control_larger'])} "
            f"(ratio {figure(control, 4)}), so this lead is no evidence for a link to affect."
        )
    return allowed(f"{counts}: more than noise gives, in this pair.")


def _against_control(known: pd.DataFrame) -> Iterator[Said]:
    if known.empty:
        return
    tuned, control = known["ratio"], known["control_ratio"]
    pair = f"tuned {between(tuned.tolist())}, control {between(control.tolist())}"
    if (abs(tuned / control - 1) < LITTLE).all():
        yield barred(
            f"The control tuning gives nearly the same ratios of gate_proj to up_proj ({pair}), so a "
            "difference between the two roles is not specific to affect."
        )
    elif ((tuned > 1) == (control > 1)).all():
        yield barred(
            f"The control tuning orders gate_proj and up_proj the same way under every norm ({pair}), so the "
            "order is not specific to affect."
        )
    else:
        norms = listed(NORMS[str(norm)] for norm in known.index[(tuned > 1) != (control > 1)])
        yield allowed(f"The control tuning orders gate_proj and up_proj the other way by {norms} ({pair}).")


def _untargeted(drift: Drift) -> Iterator[Said]:
    roles = unreached(drift)
    if roles:
        yield barred(
            f"The tuning could not reach {listed(roles)}: zero drift there is a choice of the set-up, not a "
            "finding."
        )
    frame = drift.frame
    other = frame[
        (frame["tower"] == "language") & ~frame["role"].isin(ROLES) | (frame["tower"] != "language")
    ]
    total, rest = (frame["frobenius"] ** 2).sum(), (other["frobenius"] ** 2).sum()
    if total and rest / total >= 0.01:  # below one percent it would only distract
        yield allowed(
            f"{percent(rest / total)} of ‖Δ‖² is outside the attention and feed-forward roles of the "
            "language tower (embeddings, norms, other towers)."
        )
