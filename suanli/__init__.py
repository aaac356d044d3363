"""Suanli: the fastest verified way to run and to train a model on this machine.

The public names load on first use, so that ``import suanli`` costs no torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from suanli.api import doctor, export, load, optimize, rebuild, run, train
    from suanli.api_predict import predict
    from suanli.api_profile import profile
    from suanli.api_report import report
    from suanli.engines.engine import Engine
    from suanli.workloads.record import Workload

_HOMES = {
    "doctor": "suanli.api",
    "optimize": "suanli.api",
    "load": "suanli.api",
    "predict": "suanli.api_predict",
    "profile": "suanli.api_profile",
    "report": "suanli.api_report",
    "run": "suanli.api",
    "rebuild": "suanli.api",
    "export": "suanli.api",
    "train": "suanli.api",
    "Engine": "suanli.engines.engine",
    "Workload": "suanli.workloads.record",
}

__all__ = [
    "Engine",
    "Workload",
    "__version__",
    "doctor",
    "export",
    "load",
    "optimize",
    "predict",
    "profile",
    "rebuild",
    "report",
    "run",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'suanli' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
