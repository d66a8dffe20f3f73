"""Processes that end with those that started them, and the CPUs that they may use. Imports little: every stage begins with it."""

import contextlib
import ctypes
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

GRACE = 1.5  # seconds that a process has to end in good order
CORES = "NAQSH_CORES"  # the environment variable by which `make repro` gives each of its processes a share of the CPUs
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores() -> int:
    """How many CPUs this process may use, at least 1: by its affinity, the quotas of its cgroups, and NAQSH_CORES."""
    known = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1), *_quotas()]
    with contextlib.suppress(ValueError):
        known.append(float(os.environ.get(CORES, "")))
    return max(1, round(min(known)))


def has_gpu() -> bool:
    """Whether there is an Nvidia GPU; torch, which knows better, takes seconds to say so."""
    return Path("/dev/nvidiactl").exists()


def _quotas() -> Iterator[float]:
    """The CPUs that the cgroups of this process leave it, in version 1 and 2; those around a cgroup limit it too.

    In a container OWN_CGROUPS may give the host's path, where CGROUPS shows only what is inside.
    """
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mounted in [CGROUPS / controllers, CGROUPS / "cpu"] if controllers else [CGROUPS, CGROUPS / "unified"]:
            own = mounted / path.lstrip("/")
            for folder in (own, *own.parents[: len(own.parts) - len(mounted.parts)]):
                with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no limit is "max", or -1
                    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
                    quota, period = " ".join((folder / name).read_text() for name in names).split()
                    if int(quota) > 0:
                        yield int(quota) / int(period)


def dvc_stage() -> tuple[str, str]:
    """Name of the stage that DVC runs in this process, and of its dataset or cell; empty where there is none."""
    name, _, item = os.environ.get("DVC_STAGE", "").rpartition(":")[2].partition("@")
    return name, item


def end_with_parent() -> None:
    """Get a SIGTERM when the parent is killed, on Linux, so that no orphan goes on writing."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def end_with_parents() -> None:
    """End when DVC does, or any shell between it and this process: a shell outlives a DVC that is killed."""
    end_with_parent()
    above: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            above.append(process)
            if "DVC_STAGE" not in os.environ or process.environ().get("DVC_STAGE") != os.environ["DVC_STAGE"]:
                break  # the parent, or DVC itself
        if above[-1].pid == 1 and "dvc" not in " ".join(above[-1].cmdline()):  # it is gone already
            sys.exit(143)
    threading.Thread(target=_follow, args=[above], daemon=True).start()


def _follow(processes: list[psutil.Process]) -> None:
    while all(map(is_alive, processes)):
        time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that ended and whose end nobody has heard of yet does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def cpu_model(file: Path = Path("/proc/cpuinfo")) -> str:
    """Maker and model of the CPU, in its own numbers: virtual machines give one name to many. Without Linux, the architecture.

    Args:
        file: in which Linux tells of the CPUs.
    """
    try:
        told = file.read_text(errors="replace")
    except OSError:
        told = ""
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")  # of x86; of Arm
    found = [match[1] for name in names if (match := re.search(rf"^{name}\s*:[ \t]*(\S+)", told, re.MULTILINE))]
    return " ".join(found) or platform.machine()
