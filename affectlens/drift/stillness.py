"""Say whether the language model did not move, or was not compared: only the first is a result."""

from collections.abc import Iterator

import pandas as pd

from affectlens.checkpoints import Checkpoint, Pairing
from affectlens.checkpoints.tying import VOCABULARY
from affectlens.sites import Site


def stillness(pairing: Pairing, frame: pd.DataFrame) -> Iterator[str]:
    """Yield a sentence if the language model did not move, or if none of its matrices was compared.

    `frame` has the rows of the compared sites.
    """
    language = frame[(frame["tower"] == "language") & frame["frobenius"].notna()]
    if language.empty:
        return
    reached = language[language["targeted"]]
    if reached.empty:
        yield "The adapter has no weights for the language model, so the language model could not move."
        return
    stored = {site for side in (pairing.base, pairing.tuned) for site in side.storage if _matrix(side, site)}
    compared = stored & set(pairing.compared)
    skipped = {**pairing.base.skipped, **pairing.tuned.skipped}
    left_out = bool(stored - compared) or any(
        size > 1 for _, size in skipped.values()
    )  # one number is a scale
    if not compared:
        yield (
            "No matrix of the language model was compared, so whether the language model moved is not known: "
            "the ledger says why."
        )
    elif not _moved(reached) and left_out:
        yield (
            f"The {len(compared)} compared matrices of the language model did not move at all; others were "
            "not compared, so whether the language model moved is not known."
        )
    elif not _moved(reached):
        yield "The language model did not move at all: its drift is exactly zero."


def _matrix(side: Checkpoint, site: Site) -> bool:
    """Return whether a site is a matrix within the language model, between its embeddings."""
    own = site.tower == "language" and site.role not in VOCABULARY and site.param != "bias"
    return own and len(side.shape(site)) >= 2 and 0 not in side.shape(site)


def _moved(frame: pd.DataFrame) -> bool:
    columns = frame[["frobenius", "changed", "nonfinite"]].fillna(0)
    return bool(columns.to_numpy(float).any())
