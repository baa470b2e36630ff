"""What a diff must say aloud: no drift at all, rounding alone, strangers, a control that controls nothing."""

from collections.abc import Collection, Iterator

import pandas as pd

from affectlens.drift.drift import Drift
from affectlens.drift.sums import Sums
from affectlens.errors import NothingToCompare


def findings(frame: pd.DataFrame, found: Collection[Sums]) -> Iterator[str]:
    """Sentences on what must not be overlooked, given the rows and the sums they were made of."""
    moved = sum(not sums.identical for sums in found)
    rounded = sum(sums.rounds and not sums.identical for sums in found)
    if not all(sums.scaled for sums in found):
        yield (
            "No file says LoRA's alpha, so the drift is known up to one common factor, alpha/r: ratios "
            "between modules hold, sizes do not. Give alpha= or preset=."
        )
    if unread := sum(not sums.read for sums in found):
        yield (
            f"{unread} parameters lie in files of equal content on both sides: they did not move, and were "
            "not read, so their norms are not known (detail='exact' reads them)."
        )
    language = frame[(frame["tower"] == "language") & frame["frobenius"].notna()]
    reached = language[language["targeted"]]
    if len(language) and reached.empty:
        yield "The adapter holds nothing of the language model, which so could not move."
    elif len(reached) and not _moved(reached):
        yield "The language model did not move at all: its drift is exactly zero."
    if rounded:
        yield f"{rounded} of {moved} parameters that moved did so by rounding to another dtype alone."
    if unrelated(frame):
        yield "This is probably not the base: no weight matrix of tuned resembles its partner (cosine ≈ 0)."
    yield from _zeros(frame)
    yield from _casting(frame)
    if "control_frobenius" in frame:
        yield from _control(frame)
    if count := int(frame["nonfinite"].sum()):
        yield f"{count:,} values are NaN or infinite and were left out of every other measure."


def _moved(frame: pd.DataFrame) -> bool:
    columns = frame[["frobenius", "changed", "nonfinite"]].fillna(0)
    return bool(columns.to_numpy(float).any())


def _zeros(frame: pd.DataFrame) -> Iterator[str]:
    """Where a side has nothing but zeros: weights that were never saved, or lost on the way."""
    weights = frame[(frame["frobenius"] > 0) & (frame["param"] == "weight") & (frame["role"] != "norm")]
    for side in ("base", "tuned"):
        zero = weights[weights[f"{side}_norm"] == 0]
        if len(zero):
            first = f"first: {zero['parameter'].iloc[0]}"
            yield f"{len(zero)} weights of {side} are zero in every value, unlike their partners ({first})."


def _casting(frame: pd.DataFrame) -> Iterator[str]:
    """Where the drift is no larger than what saving the tuned weights in their dtype makes by itself."""
    moved = frame[(frame["frobenius"] > 0) & (frame["param"] == "weight") & frame["rounding"].notna()]
    within = moved[moved["rounding"] >= moved["frobenius"]]
    if len(within):
        yield (
            f"{len(within)} of {len(moved)} weights that moved did so by no more than rounding to their "
            f"dtype can account for (first: {within['parameter'].iloc[0]})."
        )


def _control(frame: pd.DataFrame) -> Iterator[str]:
    if lacking := int(frame["control_along"].isna().sum()):
        yield f"The control lacks {lacking} of the {len(frame)} compared parameters: it says nothing of them."
    if lost := int(frame["control_nonfinite"].sum()):
        yield f"{lost:,} values of the control are NaN or infinite and were left out of its measures."
    moved = frame[(frame["frobenius"] > 0) | (frame["control_frobenius"] > 0)]
    if control_unrelated(frame):
        yield "This is probably no tuning of the same base: the control's weights are unrelated to it."
    elif not moved["control_frobenius"].any():
        yield "The control equals base in every value, so it controls nothing."
    elif len(moved) and (moved["control_cosine"] > 1 - 1e-6).all():
        yield "The control's change has the direction of tuned's at every site: is it the same tuning?"


def control_unrelated(frame: pd.DataFrame) -> bool:
    """Whether the control is a stranger to base: as far from it as independent weights are."""
    if "control_relative" not in frame:
        return False
    known = _matrices(frame)["control_relative"].dropna()
    return bool(len(known)) and bool(known.median() > 1.2)


def unrelated(frame: pd.DataFrame) -> bool:
    """Whether the two look like strangers: matrices as far apart as independent draws are.

    Independent weights of one scale give a relative drift of √2 and a cosine of 0.
    """
    big = _matrices(frame)
    if big.empty:
        return False
    return bool(big["cosine"].abs().median() < 0.1 and big["relative"].median() > 0.9)


def _matrices(frame: pd.DataFrame) -> pd.DataFrame:
    # Norms start from ones in every model, and so resemble each other between strangers.
    return frame[(frame["param"] == "weight") & (frame["role"] != "norm") & (frame["size"] >= 256)]


def refuse_unrelated(drift: Drift) -> Drift:
    """Return the drift of a kindred pair; raise `NothingToCompare` for strangers of one shape."""
    if unrelated(drift.frame):
        names = [source["name"] for source in drift.origin["sources"].values()]
        raise NothingToCompare(
            f"{names[0]} is probably not the base of {names[1]}: their weights are unrelated (cosine ≈ 0)"
        )
    if control_unrelated(drift.frame):
        raise NothingToCompare("the control is probably no tuning of this base: their weights are unrelated")
    return drift
