"""One Ctrl-C, one SIGTERM, or the death of who started it ends all that `make repro` started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.pipeline.processes import is_alive

ROOT = Path(__file__).parents[2]
STUBBORN = """
import os, signal, subprocess, sys, time
for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, signal.SIG_IGN)
if sys.argv[1:]:
    subprocess.Popen([sys.executable, "stubborn.py"])
with open("pids", "a") as file:
    print(os.getpid(), file=file)
time.sleep(60)
"""
RUNNER = """
import sys
from stages.pipeline import processes
from stages.sweep import runner, warm
processes.end_with_parent()
def main():
    return runner.run((sys.executable, "stubborn.py", "parent"))
runner.main = main
sys.exit(runner.started())
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def heed_signals() -> None:
    """As in a terminal: who runs in the background of a script ignores some."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


@pytest.fixture
def running(tmp_path: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A runner below a shell; and two processes below it that ignore what asks them to end."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    (tmp_path / "runner.py").write_text(RUNNER)
    shell = ["sh", "-c", f"{sys.executable} runner.py; exit $?"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        shell, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_signals
    )
    while len((tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    return process, [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_one_signal_ends_all_and_says_how_to_go_on(running, how: signal.Signals, code: int) -> None:
    process, below = running
    (runner,) = psutil.Process(process.pid).children()
    runner.send_signal(how)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said == "\nStopped. `make repro` goes on from here.\n"
    assert not any(map(is_alive, below))


def test_what_is_killed_takes_all_along(running) -> None:
    process, below = running
    process.kill()  # the shell; make is the like
    until = time.monotonic() + 30
    while any(map(is_alive, below)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_alive, below))


def test_the_code_of_a_command_is_passed_on(tmp_path: Path) -> None:
    command = "import sys; from stages.sweep import runner; sys.exit(runner.run((sys.executable, '-c', {!r})))"
    for script, code in (("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        assert subprocess.run([sys.executable, "-c", command.format(script)], cwd=ROOT, check=False).returncode == code
