"""Stages forked from a warm process behave as those that start by themselves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.sweep import warm

ROOT = Path(__file__).parents[2]
PROBE = """
import json, os, signal, sys, time
from pathlib import Path
from stages.errors import UserError

told = sys.argv[1]
if told == "sleep":
    Path("pid").write_text(str(os.getpid()))
    print(flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
elif told == "refuse to end":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path("pid").write_text(str(os.getpid()))
    print(flush=True)
    time.sleep(60)
elif told == "refuse":
    sys.exit("probe: refused")
elif told == "crash":
    raise RuntimeError("crashed")
about = {"arguments": sys.argv[1:], "name": Path(sys.argv[0]).stem, "cwd": os.getcwd(), "greeting": os.environ.get("GREETING")}
print(json.dumps(about | {"warm": "wave" in sys.modules, "asks": "NAQSH_WARM" in os.environ, "code": 1}))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stages are forked on Linux alone")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with the project's plumbing, but for a library that is soon imported, and one stage that tells of itself."""
    for name in (
        "__init__.py",
        "errors/__init__.py",
        "pipeline/inputs.py",
        "pipeline/processes.py",
        "sweep/warm.py",
        "tracking/mlflow_forms.py",
    ):
        (tmp_path / "stages" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "stages" / name, tmp_path / "stages" / name)
    plumbing = tmp_path / "stages" / "sweep" / "warm.py"
    plumbing.write_text(
        re.sub(r"^LIBRARIES = \(.*?^\)", 'LIBRARIES = ("wave",)', plumbing.read_text(), flags=re.MULTILINE | re.DOTALL)
    )
    (tmp_path / "stages" / "probe.py").write_text(PROBE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def under_warm(command: str) -> subprocess.CompletedProcess[str]:
    shell = ["sh", "-c", command.replace("python", sys.executable)]
    return subprocess.run([sys.executable, "-m", "stages.sweep.warm", *shell], capture_output=True, text=True, check=False)


def started(command: str) -> tuple[subprocess.Popen[str], int]:
    """A stage that sleeps under a warm process: that process, and the process id of the stage."""
    shell = ["sh", "-c", command.replace("python", sys.executable)]
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.sweep.warm", *shell], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    process.stdout.readline()
    return process, int(Path("pid").read_text())


def is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_fork_has_the_libraries_and_all_that_a_process_of_its_own_has(workspace: Path) -> None:
    (workspace / "sub").mkdir()
    alone = subprocess.run([sys.executable, "-m", "stages.probe", "a", "b c"], capture_output=True, text=True, check=True)
    forked = under_warm("GREETING=salam python -m stages.probe a 'b c'")
    own = json.loads(alone.stdout)
    assert own == {"arguments": ["a", "b c"], "name": "probe", "cwd": str(workspace), "greeting": None, "warm": False,
                   "asks": False, "code": 1}  # fmt: skip
    assert json.loads(forked.stdout) == own | {"warm": True, "greeting": "salam"}
    assert forked.returncode == 0


def test_code_that_changes_meanwhile_is_what_runs(workspace: Path) -> None:
    edit = 'sed -i \'s/"code": 1/"code": 22/\' stages/probe.py'
    told = under_warm(f"python -m stages.probe a && {edit} && python -m stages.probe a").stdout.splitlines()
    assert [json.loads(line)["code"] for line in told] == [1, 22]


@pytest.mark.parametrize(("told", "code", "says"), [("refuse", 1, "probe: refused\n"), ("crash", 1, "RuntimeError: crashed\n")])
def test_an_error_arrives(workspace: Path, told: str, code: int, says: str) -> None:
    ended = under_warm(f"python -m stages.probe {told}")
    assert ended.returncode == code
    assert ended.stderr.endswith(says)
    assert ended.stdout == ""


def test_sigterm_is_passed_on(workspace: Path) -> None:
    process, stage = started("python -m stages.probe sleep & while ! test -s pid; do sleep 0.1; done; kill -TERM $!; wait $!")
    assert process.wait(30) == 128 + signal.SIGTERM
    assert is_gone(stage)


def test_ctrl_c_reaches_the_fork_and_the_command_hears_how_it_ended(workspace: Path) -> None:
    process, stage = started("trap '' INT; python -m stages.probe sleep")  # as DVC, which ignores it while a stage runs
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert is_gone(stage)


def test_a_fork_does_not_outlive_who_asked(workspace: Path) -> None:
    process, stage = started("python -m stages.probe sleep & while ! test -s pid; do sleep 0.1; done; kill -KILL $!; wait $!")
    assert process.wait(30) == 128 + signal.SIGKILL
    assert is_gone(stage)


@pytest.mark.parametrize("told", ["sleep", "refuse to end"])
def test_a_killed_command_takes_its_fork_along(workspace: Path, told: str) -> None:
    process, stage = started(
        f'exec python -c \'import subprocess, sys; subprocess.run([sys.executable, "-m", "stages.probe", "{told}"])\''
    )
    process.terminate()
    process.wait(30)
    assert is_gone(stage)


def test_a_command_that_is_killed_while_the_libraries_are_imported_is_heard_of(workspace: Path) -> None:
    plumbing = workspace / "stages/sweep/warm.py"
    plumbing.write_text(plumbing.read_text().replace('LIBRARIES = ("wave",)', 'LIBRARIES = ("slow",)'))
    (workspace / "slow.py").write_text("import time\nfrom pathlib import Path\nPath('pid').write_text('0')\ntime.sleep(60)\n")
    command = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-m', 'stages.probe', 'sleep'])"]
    process = subprocess.Popen([sys.executable, "-m", "stages.sweep.warm", *command], start_new_session=True)
    while not Path("pid").exists():
        assert process.poll() is None
        time.sleep(0.05)
    (child,) = (child for child in psutil.Process(process.pid).children() if "stages.sweep.warm" not in child.cmdline())
    child.kill()
    assert process.wait(10) == 128 + signal.SIGKILL


def test_a_stage_that_is_ended_before_it_begins_ends_at_once(workspace: Path) -> None:
    """To import the libraries may take long; the fork that they are for never works."""
    plumbing = workspace / "stages/sweep/warm.py"
    plumbing.write_text(plumbing.read_text().replace('LIBRARIES = ("wave",)', 'LIBRARIES = ("slow",)'))
    (workspace / "slow.py").write_text("import time\nfrom pathlib import Path\nPath('pid').write_text('0')\ntime.sleep(4)\n")
    told = "import subprocess, sys, time; from pathlib import Path\n"
    told += "stage = subprocess.Popen([sys.executable, '-m', 'stages.probe', 'a'], stdout=subprocess.PIPE)\n"
    told += "while not Path('pid').exists(): time.sleep(0.05)\n"
    told += "began = time.monotonic(); stage.terminate(); code = stage.wait()\n"
    told += "print(code, time.monotonic() - began < 2); time.sleep(5); print(stage.stdout.read())\n"
    done = subprocess.run(
        [sys.executable, "-m", "stages.sweep.warm", sys.executable, "-c", told], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "143 True\nb''\n", done.stderr


def test_without_a_listener_a_stage_starts_by_itself(workspace: Path) -> None:
    environment = {**os.environ, warm.ADDRESS: "nobody"}
    command = [sys.executable, "-m", "stages.probe", "a"]
    told = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert not told["warm"]


def test_a_person_turns_it_off(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(warm.ADDRESS, "0")
    told = json.loads(under_warm("python -m stages.probe a").stdout)
    assert not told["warm"]


def test_no_file_is_left_behind(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := workspace / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    process, stage = started("exec python -m stages.probe sleep")
    process.kill()
    process.wait(30)
    assert is_gone(stage)
    assert not list(folder.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_not_served(workspace: Path) -> None:
    ask = (
        "import os, socket; os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
        "s.connect(chr(0) + os.environ['NAQSH_WARM']); print(len(s.recv(1)))"
    )
    assert under_warm(f'python -c "{ask}"').stdout == "0\n"


FOLLOWER = """
import os, time
from pathlib import Path
from stages.pipeline import processes
processes.end_with_parents()
Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""
DVC = """
import os, subprocess, sys
subprocess.run(["/bin/sh", "-c", f"{sys.executable} follower.py; true"], env={**os.environ, "DVC_STAGE": "train@x"})
"""


@pytest.mark.parametrize("whom", ["dvc", "shell"])
def test_a_stage_ends_with_dvc_and_with_a_shell_between(workspace: Path, monkeypatch: pytest.MonkeyPatch, whom: str) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    Path("follower.py").write_text(FOLLOWER)
    Path("dvc.py").write_text(DVC)
    dvc = subprocess.Popen([sys.executable, "dvc.py"])
    while not (Path("pid").exists() and Path("pid").read_text()):
        assert dvc.poll() is None
        time.sleep(0.05)
    stage = psutil.Process(int(Path("pid").read_text()))
    shell = stage.parent()
    assert shell
    assert shell.ppid() == dvc.pid
    (dvc if whom == "dvc" else shell).kill()
    assert is_gone(stage.pid)
    dvc.wait(30)


def test_who_goes_away_before_asking_does_no_harm(workspace: Path) -> None:
    hang_up = "import os, socket; s = socket.socket(socket.AF_UNIX); s.connect(chr(0) + os.environ['NAQSH_WARM'])"
    told = under_warm(f'python -c "{hang_up}" && python -m stages.probe a')
    assert json.loads(told.stdout)["warm"]
    assert told.stderr == ""
