"""HOW FAR: the distance of every site from base to tuned, read from files and never through a model.

    Pairing ── planning ──▶ strips in parts ── streaming, summing ──▶ Sums ── tabulating ──▶ Drift

`summing` gives blocks of bytes as they lie to the compiled `kernel` (or to `blocked`, torch's), numbers to
`measuring`, and what an adapter says by its factors to `factoring`. `contrasting`, `following` and
`agreeing` ask further of drifts: beside noise and control, over steps, and over runs.
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
