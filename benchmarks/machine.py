"""The machine a result was measured on, and how busy it was."""

import os
import platform
from datetime import UTC, datetime
from typing import Any

from suanli.base.lazy import version

LIBRARIES = ("torch", "openvino", "nncf", "onnxruntime", "transformers")


def machine() -> dict[str, Any]:
    """Hardware, versions, load and date, as every results file carries them."""
    from suanli.devices import cpu_info

    cpu = cpu_info()
    return {
        "cpu": cpu.model,
        "cores": cpu.usable_cores,
        "features": list(cpu.features),
        "memory_bytes": cpu.memory_bytes,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        **moment(),
    }


def moment() -> dict[str, Any]:
    """The date, and the load average of the last minute."""
    return {
        "load_average": os.getloadavg()[0],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
