"""HOW FAR: the distance of every site from base to tuned, measured from files without building a model.

    Pairing ── parts ──▶ strips, cut into parts ── streaming, blocks ──▶ Sums ── measures ──▶ Drift

`diffing` runs this flow. `blocks` reads a part block by block and passes the raw words to an `Engine`:
`numba_engine`, compiled, or `torch_engine`, its reference and fallback. `whole_matrices` adds what needs
a whole matrix (`spectra`, `alignment`). `groups` aggregates the rows of a `Drift`; `trajectories`
compares drifts over the steps of a tuning, `agreements` over runs.
"""

from typing import TYPE_CHECKING

from affectlens.lazy import resolver

if TYPE_CHECKING:
    from affectlens.drift.agreements import Agreement, agreement
    from affectlens.drift.diffing import diff
    from affectlens.drift.drift import Drift
    from affectlens.drift.trajectories import Trajectory, trajectory

__all__ = ["Agreement", "Drift", "Trajectory", "agreement", "diff", "trajectory"]
__getattr__ = resolver(
    __name__,
    {
        "Agreement": "agreements",
        "Drift": "drift",
        "Trajectory": "trajectories",
        "agreement": "agreements",
        "diff": "diffing",
        "trajectory": "trajectories",
    },
)
