#!/usr/bin/env python3
"""Change the rate of every link of the emulated cluster that this runs on, while it runs.

    launch/emulate --hosts 2 --rate none -- sh -c 'python launch/emulate_rate.py 200mbit && ...'

Runs on any of the hosts. Whoever compares rates keeps its processes and what they have set up. Exit status: 1 if this is no host
of a cluster of `launch/emulate`, or the rate could not be set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import emulate_kernel as kernel
from emulate_hosts import STATE, shaping, tool

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def parse_rate(text: str) -> float | None:
    """Link rate in bit/s from tc's notation (`200mbit`, `1gbit`), None from `none`; raises argparse.ArgumentTypeError."""
    if text == "none":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; write a number with kbit, mbit or gbit, such as 200mbit, or none")
    return float(match[1]) * UNITS[match[2]]


def set_rate(rate: float | None) -> None:
    """Shape all links to `rate` bit/s in each direction, or to nothing with None.

    Raises:
        SystemExit: not on an emulated host, or `tc` failed.
    """
    if not STATE.exists():
        sys.exit(f"emulate_rate: {STATE} is not here: run this on a host of `launch/emulate`")
    holders = json.loads(STATE.read_text())["holders"].values()
    for index, holder in enumerate(holders):
        _shape(f"port{index}", rate, partial(kernel.enter_network, 1))
        _shape("eth0", rate, partial(kernel.enter_network, holder))


def _shape(device: str, rate: float | None, enter: Callable[[], None]) -> None:
    words = ["del", "dev", device, "root"] if rate is None else ["replace", "dev", device, *shaping(rate).split()]
    command = [tool("tc"), "qdisc", *words]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)
    if done.returncode and rate is not None:
        sys.exit(f"emulate_rate: {' '.join(command)}: {done.stderr.strip()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rate", type=parse_rate, help="200mbit, 1gbit, none")
    set_rate(parser.parse_args().rate)
