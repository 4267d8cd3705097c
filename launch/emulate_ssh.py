"""The `ssh` of an emulated cluster: runs a command on one of its hosts, without a network, a daemon or a key.

`launch/emulate` puts it first on PATH. It takes ssh's command line, enters the namespaces of the named host and becomes the
remote shell, so that stdin, stdout, signals and the exit status need no relay. As with sshd:

- the words after the host are joined by blanks into one command for the user's shell; no words give a login shell;
- the caller's environment and working directory do not travel. The remote command starts with what `emulate` itself was started
  with plus what emulate adds, as if every host's login files set just that. It starts in emulate's working directory, where real
  ssh starts in the home directory;
- a failure of ssh itself is exit status 255.

Options that change who logs in or how (-l, -p, -i, -o, -F, user@host, ...) mean nothing here and are accepted; those that ask for
a connection which would not exist (forwarding, multiplexing) are refused.
"""

from __future__ import annotations

import getopt
import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from emulate_hosts import STATE, login

OPTIONS = "1246ab:c:e:fgi:kl:m:no:p:qstvxAB:CD:E:F:GI:J:KL:MNO:P:Q:R:S:TVw:W:XYy"  # ssh(1)
REFUSED = {"-D", "-G", "-J", "-L", "-M", "-N", "-O", "-Q", "-R", "-W", "-f", "-s", "-w"}


def fail(message: str) -> NoReturn:
    """Report a failure of ssh itself."""
    print(f"ssh (emulated): {message}", file=sys.stderr)
    raise SystemExit(255)


def parse(argv: Sequence[str]) -> tuple[str, str, bool]:
    """Split ssh's arguments into host, command ("" for a login shell) and whether stdin is /dev/null (-n).

    Options may also follow the host, as in ssh. Exits with 255 on a wrong or refused option or a missing host.
    """
    options: list[tuple[str, str]] = []
    host, rest = "", list(argv)
    try:
        for _ in range(2):
            found, rest = getopt.getopt(rest, OPTIONS)
            options += found
            if not host and rest:
                host, rest = rest[0], rest[1:]
    except getopt.GetoptError as error:
        fail(str(error))
    names = {name for name, _ in options}
    if refused := sorted(names & REFUSED):
        fail(f"option {refused[0]} has no meaning between emulated hosts; leave it out")
    if "-V" in names:
        print("ssh of espresso_ds launch/emulate", file=sys.stderr)
        raise SystemExit(0)
    if not host:
        fail("usage: ssh [options] host [command...]")
    return host.removeprefix("ssh://").rpartition("@")[2], " ".join(rest), "-n" in names


def main() -> NoReturn:
    """Become the remote command."""
    host, command, without_stdin = parse(sys.argv[1:])
    state = json.loads(STATE.read_text())
    if host not in state["holders"]:
        fail(f"Could not resolve hostname {host}: the emulated hosts are {', '.join(state['holders'])}")
    if without_stdin:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    shell = state["env"].get("SHELL") or shutil.which("sh")
    argv = [shell, "-c", command] if command else [shell, "-l"]
    try:
        login(state["holders"][host], host, argv, state["env"], state["directory"])
    except OSError as error:
        fail(f"cannot run on {host}: {error}")


if __name__ == "__main__":
    main()
