"""WHAT IF: values that say which sites get which weights, and which points which activations.

on weights      Transplant (transplant), Randomise Shuffle (on_weights)              ┐
on either       Zero Scale (on_weights)                                              ├─▶ lens.intervene, write
on activations  Mean Resample Knockout Steer (on_activations), Patch (patch)         ┘

A lens applies them for the length of a block and then restores every bit; `write` puts those on weights into
files. `edits` has what they share; `as_json` writes them down and reads them again.
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
