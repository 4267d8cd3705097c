"""What figures were taken on."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import numpy


def machine() -> dict[str, str | int | float]:
    """What the figures were taken on."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "load_average_1min": os.getloadavg()[0],
        "taken": time.strftime("%Y-%m-%d"),
    }
