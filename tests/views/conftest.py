"""Make tables with known numbers, and a name that a hostile file might contain."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from affectlens.drift.drift import Drift
from affectlens.effects.effects import Effects

ROLES = {
    "q_proj": 64,
    "k_proj": 32,
    "v_proj": 32,
    "o_proj": 64,
    "gate_proj": 192,
    "up_proj": 192,
    "down_proj": 192,
}
NORMS = {
    "q_proj": 4.0,
    "k_proj": 3.0,
    "v_proj": 3.0,
    "o_proj": 4.0,
    "gate_proj": 8.0,
    "up_proj": 10.0,
    "down_proj": 9.0,
}


@pytest.fixture
def hostile() -> str:
    """Return a name that runs as a script wherever it isn't escaped."""
    return "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def make_drift() -> Callable[..., Drift]:
    """Return the function that builds a drift.

    The rms of a role is `scale` × 0.001 in each of `layers` layers, and 0.0005 under the control.
    """
    return drift


@pytest.fixture
def make_effects() -> Callable[..., Effects]:
    """Return the function that builds the effects of one task from each role's transplant effect."""
    return effects


def drift(
    *, layers: int = 4, scale: dict[str, float] | None = None, control: bool = True, **more: Any
) -> Drift:
    """Build a drift, see `make_drift`."""
    rows = []
    for layer in range(layers):
        for role, size in ROLES.items():
            rms = 0.001 * (scale or {}).get(role, 1.0)
            half = "mlp" if size == 192 else "self_attn"
            row = {
                "parameter": f"model.layers.{layer}.{half}.{role}.weight",
                "tower": "language", "stack": None, "layer": layer, "role": role, "expert": None,
                "param": "weight", "label": "", "size": size, "dtype": "bfloat16",
                "frobenius": rms * size**0.5, "base_norm": NORMS[role],
                "relative": rms * size**0.5 / NORMS[role], "rms": rms,
                "mean_abs": 0.8 * rms, "max_abs": 4 * rms,
                "cosine": 0.999, "changed": size, "sign_flips": 1, "nonfinite": 0, "targeted": True,
            }  # fmt: skip
            if control:
                row |= {"control_frobenius": 0.0005 * size**0.5, "control_rms": 0.0005, "control_cosine": 0.1}
                row["control_relative"] = 0.0005 * size**0.5 / NORMS[role]
            rows.append(row)
    frame = pd.DataFrame(rows)
    frame["layer"] = frame["layer"].astype("Int64")
    total = int(frame["size"].sum())
    sides = ("base", "tuned", *(["control"] if control else []))
    origin = {
        "sources": {side: source(side, total) for side in sides},
        "versions": {"affectlens": "0.1.0", "torch": "2.13.0"},
        "seed": 0,
        "command": "affectlens diff base tuned --control gsm8k",
        "ledger": [{"state": "paired", "sites": len(frame), "base_parameters": total,
                    "tuned_parameters": total, "note": "compared"}],
        **more,
    }  # fmt: skip
    return Drift(frame, origin)


def source(name: str, parameters: int) -> dict[str, Any]:
    """Return the facts on a checkpoint as an origin stores them."""
    return {
        "name": name, "format": "safetensors, 2 shards", "header_sha256": "3f9a" * 16,
        "bytes": 2 * parameters, "parameters": parameters, "dtype": "bfloat16", "model_type": "qwen2_5_vl",
    }  # fmt: skip


def effects(
    moved: dict[str, float], *, task: str = "emotion", metric: str = "margin", gain: float = 1.0,
    wide: float = 0.05, draws: int = 20, null: float = 0.1, control: float = 0.02, kind: str = "affective",
    actions: tuple[str, ...] = ("transplant", "revert"),
) -> Effects:  # fmt: skip
    """Build effects: a revert undoes 0.8 of a transplant, null draws are spaced evenly in ±`null`."""
    base = 0.5
    spread = list(np.linspace(-null, null, draws)) if draws else []
    rows = [
        _row("transplant", "reference", "all", (base, gain, wide)) | {"parameters": 4 * sum(ROLES.values())}
    ]
    for action in actions:
        way = {"transplant": 1.0, "revert": -0.8}.get(action, -0.5)
        start = base + gain if action == "revert" else base
        share = gain if gain > wide else float("nan")
        for role, effect in moved.items():
            row = _row(action, "effect", role, (start, way * effect, wide))
            rows.append(
                row
                | {
                    "recovered": abs(way) * effect / share,
                    "parameters": 4 * ROLES.get(role, 1),
                    "null_of": "mlp",
                }
            )
            rows.append(_row(action, "control-tuning", role, (start, way * control, wide)))
        rows += [_row(action, "random-control", f"mlp #{at}", (start, way * one, wide)) | {"null_of": "mlp"}
                 for at, one in enumerate(spread)]  # fmt: skip
    frame = pd.DataFrame(rows).assign(task=task, metric=metric)
    about = {"n": 400, "majority": 0.4, "kind": kind, "about": "which emotion", "fit": False}
    return Effects(frame, {"tasks": {task: about}, "seed": 0, "command": "affectlens sweep"})


def _row(action: str, kind: str, sites: str, score: tuple[float, float, float]) -> dict[str, Any]:
    baseline, effect, wide = score
    return {
        "action": action, "sites": sites, "kind": kind, "baseline": baseline, "value": baseline + effect,
        "low": baseline + effect - 2 * wide, "high": baseline + effect + 2 * wide, "effect": effect,
        "effect_low": effect - wide, "effect_high": effect + wide, "n": 400, "seed": 0,
        "recovered": None, "parameters": None, "null_of": None,
    }  # fmt: skip
