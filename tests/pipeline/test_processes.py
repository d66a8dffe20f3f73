"""How many CPUs a process may use, by affinity, the quotas of its cgroups, and what `make repro` gave it; which model they are."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from stages.pipeline import checkpoint, processes

V2, V1 = "0::/outer/inner\n", "9:name=systemd:/\n4:cpu,cpuacct:/docker/x\n3:cpuset:/\n0::/\n"


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No limit but for an affinity to eight CPUs."""
    monkeypatch.setattr(processes, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(processes, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv(processes.CORES, raising=False)
    return tmp_path / "cgroup"


def write(own: str, files: dict[Path, str]) -> None:
    processes.OWN_CGROUPS.write_text(own)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_affinity_counts_where_no_cgroup_limits(cgroups: Path) -> None:
    assert processes.cores() == 8
    write(V2, {cgroups / "outer/inner/cpu.max": "max 100000\n"})
    assert processes.cores() == 8
    write(V1, {cgroups / "cpu,cpuacct/cpu.cfs_quota_us": "-1\n", cgroups / "cpu,cpuacct/cpu.cfs_period_us": "100000\n"})
    assert processes.cores() == 8


@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("270000 100000", 3), ("30000 100000", 1), ("50000 10000", 5)])
def test_a_quota_counts_as_cpus(cgroups: Path, quota: str, cores: int) -> None:
    write(V2, {cgroups / "outer/inner/cpu.max": f"{quota}\n"})
    assert processes.cores() == cores
    write("0::/\n", {cgroups / "cpu.max": f"{quota}\n"})  # as in a container
    assert processes.cores() == cores


def test_the_smallest_quota_around_a_cgroup_counts(cgroups: Path) -> None:
    write(V2, {cgroups / "outer/cpu.max": "300000 100000\n", cgroups / "outer/inner/cpu.max": "400000 100000\n"})
    assert processes.cores() == 3


@pytest.mark.parametrize("inside", ["", "docker/x"])  # a container shows its own at the root
def test_version_1_has_its_own_files(cgroups: Path, inside: str) -> None:
    folder = cgroups / "cpu,cpuacct" / inside
    write(V1, {folder / "cpu.cfs_quota_us": "400000\n", folder / "cpu.cfs_period_us": "100000\n"})
    assert processes.cores() == 4


@pytest.mark.parametrize(("share", "cores"), [("3", 3), ("1", 1), ("0", 1), ("64", 8), ("many", 8), ("", 8)])
def test_a_share_given_by_the_runner_counts(cgroups: Path, monkeypatch: pytest.MonkeyPatch, share: str, cores: int) -> None:
    monkeypatch.setenv(processes.CORES, share)
    assert processes.cores() == cores


def test_here_it_is_a_number_of_cpus() -> None:
    assert processes.cores() >= 1


@pytest.mark.parametrize(
    ("told", "model"),
    [
        (
            "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon\n\n" * 2,
            "GenuineIntel 6 143",
        ),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: EPYC\n", "AuthenticAMD 25 17"),
        ("CPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd0c\n", "0x41 0xd0c"),
        ("model name\t: 7\nvendor_id\t:\n", platform.machine()),
        (None, platform.machine()),
    ],
)
def test_a_cpu_is_told_by_maker_and_model(tmp_path: Path, told: str | None, model: str) -> None:
    if told is not None:
        (tmp_path / "cpuinfo").write_text(told)
    assert processes.cpu_model(tmp_path / "cpuinfo") == model


def test_the_record_of_a_machine_names_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processors with AVX-512 do not give the same bits where one is AMD's and the other Intel's."""
    monkeypatch.setattr(checkpoint, "cpu_model", lambda: "AuthenticAMD 25 17")
    one = checkpoint.machine()
    monkeypatch.setattr(checkpoint, "cpu_model", lambda: "GenuineIntel 6 143")
    assert one["device"] != "cpu" or one["processor"] != checkpoint.machine()["processor"]


def test_numpy_and_scipy_compute_on_one_thread_whatever_the_machine_has() -> None:
    """They look at the variable when they are imported."""
    code = "import sys, stages, os; print('numpy' in sys.modules, os.environ['OPENBLAS_NUM_THREADS'])"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "8"}
    )
    assert said.stdout.split() == ["False", "1"], said.stderr
