"""The quickstart's own parts: what it reads from a run, how it compares, and how it runs a command."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plans import PREDICTION
from rich.console import Console

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
sys.path.insert(0, str(LAUNCH))

import quickstart_report as report  # noqa: E402
from espresso_ds.core.errors import FileError  # noqa: E402
from quickstart_run import run_logged  # noqa: E402

PREDICTED = PREDICTION.model_copy(update={"compute_s": 1.0, "stock_s": 5.0, "uncompressed_s": 4.0, "planned_s": 1.25})


def write_run(folder: Path, step_s: float, sent: dict[str, int]) -> Path:
    steps = [99.0] * report.WARM_UP + [step_s, step_s, 77.0]  # slow first steps, then a disturbed one that a median shrugs off
    losses = [0.7] * (len(steps) + report.LAST - 2) + [0.5, 0.3]
    log = folder / "run.json"
    log.write_text(json.dumps({"seed": 4, "world_size": 2, "step_s": steps, "loss": losses, "bytes_sent": sent, "accuracy": 0.8}))
    return log


def test_a_run_counts_the_link_and_skips_the_first_steps(tmp_path):
    crossed = tmp_path / "bytes.json"
    crossed.write_text(json.dumps({"hosts": [{"host": "host0", "tx_bytes": 7000}, {"host": "host1", "tx_bytes": 9000}]}))
    run = report.read_run(write_run(tmp_path, 2.0, {"lo": 10**9, "eth0": 6000}), crossed)
    assert (run.step_s, run.bytes_per_step, run.bytes_total) == (2.0, 1000.0, 9000)
    assert run.loss == pytest.approx((0.7 * (report.LAST - 2) + 0.5 + 0.3) / report.LAST)


def test_local_ranks_share_the_loopback(tmp_path):
    run = report.read_run(write_run(tmp_path, 2.0, {"lo": 12_000, "eth0": 5}), None)
    assert (run.bytes_per_step, run.bytes_total) == (1000.0, None)


def test_a_torn_log_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 4, "step_s": [1')
    with pytest.raises(FileError, match=r"run\.json.*torn"):
        report.read_run(tmp_path / "run.json", None)


def test_table_shows_ratios_and_points():
    def runs(step_s, accuracies, per_step):
        return [report.Run(seed, step_s, 0.5, accuracy, per_step, 10**9) for seed, accuracy in enumerate(accuracies)]

    comparison = report.Comparison("200mbit", runs(5.5, [0.80, 0.82], 90e6), runs(1.1, [0.79, 0.82], 3e6), PREDICTED)
    assert comparison.speed_up == pytest.approx(5.0)
    screen = io.StringIO()
    Console(file=screen, width=120).print(report.table(comparison))
    lines = {line.split("│")[1].strip(): line for line in screen.getvalue().splitlines() if line.startswith("│")}
    assert "-0.5 points" in lines["accuracy on held-out text"] and "81.0%" in lines["accuracy on held-out text"]
    assert "1.10" in lines["measured / predicted"] and "0.88" in lines["measured / predicted"]
    assert "90.00 MB" in lines["sent by a host per step"] and "0.0333" in lines["sent by a host per step"]


def quiet() -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, width=120), screen


def test_output_goes_to_the_log_and_a_failure_shows_its_end(tmp_path):
    console, screen = quiet()
    command = [sys.executable, "-c", "print('the cause'); raise SystemExit(7)"]
    with pytest.raises(SystemExit, match="exit code 7"):
        run_logged(command, tmp_path / "log", dict(os.environ), "a command", console)
    assert "the cause" in screen.getvalue() and "the cause" in (tmp_path / "log").read_text()
    assert run_logged(command, tmp_path / "log", dict(os.environ), "a command", console, allowed=(7,)) == 7


def test_an_interrupted_command_does_not_live_on(tmp_path):
    """SIGINT to the quickstart's process alone: the command that it had started must be gone when it is."""
    mark = tmp_path / "child.pid"
    (tmp_path / "child.py").write_text(
        "import os, sys, time\n"
        "open(sys.argv[1] + '.part', 'w').write(str(os.getpid()))\n"
        "os.rename(sys.argv[1] + '.part', sys.argv[1])\n"
        "time.sleep(120)\n"
    )
    child = [sys.executable, str(tmp_path / "child.py"), str(mark)]
    program = (
        "import os, sys; from pathlib import Path; from rich.console import Console; from quickstart_run import run_logged\n"
        f"run_logged({child!r}, Path({str(tmp_path / 'log')!r}), dict(os.environ), 'sleep', Console())"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(LAUNCH)}, stderr=subprocess.DEVNULL
    )
    try:
        while not mark.exists():
            assert runner.poll() is None
            time.sleep(0.05)
        runner.send_signal(2)
        assert runner.wait(60) != 0
        assert not Path(f"/proc/{mark.read_text()}").exists()
    finally:
        runner.kill()
        runner.wait()
