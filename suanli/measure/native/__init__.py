"""Loops in C that show the processor's own limits, built on this machine and run on its cores."""

from suanli.measure.native.build import NativeLoops, native_loops
from suanli.measure.native.clock import clock_hz
from suanli.measure.native.loops import ARITHMETIC, Loop, possible_loops
from suanli.measure.native.threads import Rates, common_rates, run_pinned, summed_rates

__all__ = [
    "ARITHMETIC",
    "Loop",
    "NativeLoops",
    "Rates",
    "clock_hz",
    "common_rates",
    "native_loops",
    "possible_loops",
    "run_pinned",
    "summed_rates",
]
