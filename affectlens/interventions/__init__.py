"""WHAT IF: values that say which sites get which weights, and which points which activations.

on weights      Transplant Randomise Shuffle        ┐
on either       Zero Scale                          ├─▶ a lens applies them and undoes them exactly
on activations  Mean Resample Patch Steer Knockout  ┘
"""

from affectlens.interventions.knockout import Knockout
from affectlens.interventions.mean import Mean, Resample
from affectlens.interventions.patch import Patch
from affectlens.interventions.randomise import Randomise, Shuffle
from affectlens.interventions.scale import Scale
from affectlens.interventions.serialising import from_json, to_json
from affectlens.interventions.steer import Steer
from affectlens.interventions.transplant import Transplant
from affectlens.interventions.zero import Zero

__all__ = [
    "Knockout",
    "Mean",
    "Patch",
    "Randomise",
    "Resample",
    "Scale",
    "Shuffle",
    "Steer",
    "Transplant",
    "Zero",
    "from_json",
    "to_json",
]
