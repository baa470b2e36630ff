"""WHAT IF: values that say which sites get which weights. A lens applies them and undoes them exactly."""

from affectlens.interventions.transplant import Transplant
from affectlens.interventions.zero import Zero

__all__ = ["Transplant", "Zero"]
