"""The drift in the report: the map, the roles under two norms, and gate against up under every norm."""

import math

from affectlens.drift.drift import Drift
from affectlens.errors import NoSuchSite
from affectlens.views.drift_map import drift_map
from affectlens.views.fragments import grid, section
from affectlens.views.moved import moved, unreached
from affectlens.views.norm_contrast import norm_contrast
from affectlens.views.page import figure
from affectlens.views.role_bars import role_bars
from affectlens.views.wording import NORMS, listed
from affectlens.views.wording import figure as digits


def drift_sections(drift: Drift) -> str:
    """Write what moved; a table without attention or feed-forward sites yields its top rows only."""
    try:
        return _where(drift) + _roles(drift) + _contrast(drift)
    except NoSuchSite:
        top = drift.top(12).frame
        columns = ["parameter", "size", "frobenius", "base_norm", "relative"]
        return section("What moved most", grid(columns, top[columns].itertuples(index=False)))


def _where(drift: Drift) -> str:
    grey = unreached(drift)
    apart = f" Grey: {listed(grey)}, which the tuning could not reach." if grey else ""
    caption = "Where the language tower moved, by layer and role: ‖Δ‖ as a share of the base's ‖W‖."
    if "control_relative" in drift.frame:
        caption += " Right: the control tuning, on the same colour scale."
    if not drift.frame["layer"].notna().any():
        return ""
    return section("Where it moved", figure(drift_map(drift), caption=caption + apart))


def _roles(drift: Drift) -> str:
    rows = moved(drift).rows
    control = "control_relative" in rows
    header = ["role", "sites", "parameters", "‖Δ‖", "‖W‖", "‖Δ‖/‖W‖ (%)", "noise alone (%)", "rms"]
    body = [
        [row["role"], row["sites"], row["size"], row["frobenius"], row["base_norm"],
         digits(100 * row["relative"]), digits(100 * row["noise_relative"]), digits(row["rms"]),
         *([digits(100 * row["control_relative"]), digits(row["control_rms"])] if control else [])]
        for row in rows.to_dict("records")
    ]  # fmt: skip
    if control:
        header += ["control ‖Δ‖/‖W‖ (%)", "control rms"]
    caption = (
        "How far each role moved, by two norms. The black line is what a change of one rms in every weight "
        "would give: a bar at the line is one whose norm doesn't tell it from noise, whatever the role does."
    )
    return section("Role by role", figure(role_bars(drift), caption=caption), grid(header, body))


def _contrast(drift: Drift) -> str:
    try:
        rows = drift.contrast("gate_proj", "up_proj")
    except NoSuchSite:
        return ""
    sides = [("tuned", "first_larger", "ratio"), ("noise alone", "noise_larger", "noise_ratio")]
    if "control_ratio" in rows:
        sides.append(("control", "control_larger", "control_ratio"))
    header = ["norm", *(f"{name}: {what}" for name, *_ in sides for what in ("ratio", "gate larger"))]
    body = []
    for row in rows.to_dict("records"):
        cells = [NORMS.get(str(row["norm"]), str(row["norm"]))]
        for _, larger, ratio in sides:
            cells += _compared(row[ratio], row[larger], layers=int(row["layers"]))
        body.append(cells)
    caption = (
        "gate_proj over up_proj, the cleanest contrast: same shape, same layers. Right of the line the gate "
        "moved more. A claim that holds lies on one side under every norm, away from noise and control."
    )
    return section("Gate against up", figure(norm_contrast(drift), caption=caption), grid(header, body))


def _compared(ratio: float, larger: float, *, layers: int) -> list[str]:
    if math.isnan(ratio):
        return ["–", "–"]
    # Expectations of equal shapes are equal, and 'larger in 0 layers' would read as a defeat.
    return [digits(ratio, 4), "equal" if ratio == 1 and not larger else f"{int(larger)} of {layers}"]
