"""What measured figures were taken on: without it they mean nothing."""

from __future__ import annotations

import os
import platform
import socket
import time

import numpy
import torch

from ..core.host_facts import this_host
from ..core.hosts import people_gpus

Facts = dict[str, str | int | float]


def machine_facts() -> Facts:
    """This host's processor, cores, GPUs, network cards and load, and the versions of what computes."""
    host = this_host(socket.gethostname(), "gloo")
    return {
        "host": host.name,
        "processor": host.cpu,
        "cores": host.cores,
        "gpus": people_gpus(host.gpus),
        "network": ", ".join(f"{nic.name} ({nic.label})" for nic in host.nics) or "none",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average_1min": os.getloadavg()[0],
        "taken": time.strftime("%Y-%m-%d"),
    }
