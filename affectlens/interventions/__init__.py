"""WHAT IF: values that say which sites get which weights, and which points which activations.

on weights      Transplant Randomise Shuffle        ┐
on either       Zero Scale                          ├─▶ a lens applies them and undoes them exactly
on activations  Mean Resample Patch Steer Knockout  ┘
"""

from affectlens.interventions.as_json import from_json, to_json
from affectlens.interventions.on_activations import Knockout, Mean, Resample, Steer
from affectlens.interventions.on_weights import Randomise, Scale, Shuffle, Zero
from affectlens.interventions.patch import Patch
from affectlens.interventions.transplant import Transplant

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
