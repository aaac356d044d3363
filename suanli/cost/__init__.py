"""Layer 1: from work and ceilings to time. Imports the records only; no torch."""

from suanli.cost.bound import operator_sol, speed_of_light
from suanli.cost.estimate import estimate_ms

__all__ = ["estimate_ms", "operator_sol", "speed_of_light"]
