"""`make repro`: starts what makes all results, and ends all of it on one Ctrl-C.

    python -m stages.sweep.runner [--jobs N] [--cell NAME]

DVC ignores Ctrl-C while a stage runs. So the engine (stages/sweep/engine.py) runs in a session of its own, with all that it starts,
below the process that stages are forks of; and this process ends that session as a whole.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

import psutil

from stages.pipeline import processes

COMMAND = (sys.executable, "-m", "stages.sweep.warm", sys.executable, "-m", "stages.sweep.engine")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end it: Ctrl-C, kill, a terminal that is closed


class Stopped(BaseException):
    """Somebody asked this process to end."""


def main() -> int:
    """Make what the command line asks for; the exit code of the engine."""
    return run((*COMMAND, *sys.argv[1:]))


def run(command: tuple[str, ...]) -> int:
    """The exit code of a command that runs in a session of its own. Whatever ends this function ends that session too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is somebody to end
    group = subprocess.Popen(command, start_new_session=True, preexec_fn=_as_child)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = group.wait()
        return code if code >= 0 else 128 - code
    finally:
        _end(group)


def _as_child() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    processes.end_with_parent()


def _end(group: "subprocess.Popen[bytes]") -> None:
    """End all processes of a group: in good order, and after a grace in any."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if not _members(group):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.pid, how)
        until = time.monotonic() + processes.GRACE
        while _members(group) and time.monotonic() < until:
            time.sleep(0.05)


def _members(group: "subprocess.Popen[bytes]") -> list[int]:
    """Who of the group is alive. One that ended but was not waited for is not."""
    group.poll()
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(pid) == group.pid and processes.is_alive(psutil.Process(pid)):
                found.append(pid)
    return found


def _stop(number: int, _: FrameType | None) -> NoReturn:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # once is enough
    raise Stopped(number)


def started() -> int:
    """Run as a program that signals end. The exit code."""
    for name in SIGNALS:
        if signal.getsignal(name) != signal.SIG_IGN:  # as under nohup
            signal.signal(name, _stop)
    if "MAKELEVEL" in os.environ:
        processes.end_with_parent()
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    os.environ["NAQSH_REPRO"] = secrets.token_hex(8)  # what MLflow may cost is counted for the whole of it
    try:
        return main()
    except Stopped as stopped:
        print("\nStopped. `make repro` goes on from here.", file=sys.stderr, flush=True)
        return int(128 + stopped.args[0])


if __name__ == "__main__":
    sys.exit(started())
