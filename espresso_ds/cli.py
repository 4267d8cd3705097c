"""The `espresso` command."""

from __future__ import annotations

import argparse
import importlib
import sys

from . import __version__
from .core.errors import EspressoError

COMMANDS = ("prepare", "profile", "trace", "plan", "explain", "compare", "replan", "what_if", "bench", "doctor")
"""Modules of `espresso_ds.commands`, each with an `add_parser`."""


def parser() -> argparse.ArgumentParser:
    """The command's whole argument parser."""
    top = argparse.ArgumentParser(prog="espresso", description="Planned compression of the communication of DeepSpeed training.")
    top.add_argument("--version", action="version", version=f"espresso_ds {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    for name in COMMANDS:
        importlib.import_module(f"espresso_ds.commands.{name}").add_parser(commands)
    return top


def main(argv: list[str] | None = None) -> None:
    """Run one command; errors that users can mend are one clear line and exit code 1."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except EspressoError as error:
        sys.exit(f"espresso: {error}")
    except KeyboardInterrupt:
        sys.exit("espresso: interrupted")


if __name__ == "__main__":
    main()
