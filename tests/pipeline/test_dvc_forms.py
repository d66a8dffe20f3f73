"""DVC's private forms are what this version of DVC makes: dvc.lock, its list of who works, the folders of its experiments."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import dvc
import pytest
import zc.lockfile
from dvc.utils.serialize import load_yaml

from stages.pipeline import dvc_forms, params

ROOT = Path(__file__).parents[2]
STAGE = """\
import json, pathlib, sys, time
sys.path.insert(0, ROOT)
from stages.pipeline import dvc_forms
pathlib.Path("out.txt").write_text(str(dvc_forms.workspace()))
listed = json.loads(pathlib.Path(".dvc/tmp/rwlock").read_text()) if pathlib.Path(".dvc/tmp/rwlock").exists() else None
pathlib.Path("rwlock.json").write_text(json.dumps(listed))
"""
DVC_YAML = """\
stages:
  one:
    matrix: {x: [a, b]}
    cmd: echo ${item.x} > ${item.x}.txt
    params: [lr]
    outs: ["${item.x}.txt"]
  two:
    cmd: python stage.py
    deps: [a.txt, b.txt, stage.py]
    outs: [out.txt]
    metrics:
    - rwlock.json: {cache: false}
"""
RECHECK = "stages/pipeline/dvc_forms.py was written for DVC {}, and here is {}: see what these tests say, then change VERSION there"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline that DVC ran."""
    folder = tmp_path_factory.mktemp("dvc")
    (folder / "stage.py").write_text(f"ROOT = {str(ROOT)!r}\n{STAGE}")
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "params.yaml").write_text("lr: 1\n")
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    for command in (
        ("git", "init", "-q"),
        (*DVC, "init", "-q"),
        ("git", "add", "."),
        (*git, "commit", "-qm", "x"),
        (*DVC, "repro", "-q"),
    ):
        call(folder, *command)
    return folder


DVC = (sys.executable, "-m", "dvc")


def call(folder: Path, *command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_"))}
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment | {"PATH": path, "DVC_NO_ANALYTICS": "1"})


def test_this_is_the_version_that_they_were_looked_at_in() -> None:
    assert dvc.__version__.startswith(f"{dvc_forms.VERSION}."), RECHECK.format(dvc_forms.VERSION, dvc.__version__)
    assert f'"dvc=={dvc_forms.VERSION}.*"' in (ROOT / "pyproject.toml").read_text(), "`make lock` would bring another"


def test_the_lock_splits_into_its_entries_and_is_put_together_again(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    content = dvc_forms.LOCK.read_bytes()
    entries = dvc_forms.read_lock()
    assert {name: dvc_forms.recorded(entries, name) for name in entries} == load_yaml("dvc.lock")["stages"]
    assert entries.keys() == {"one@a", "one@b", "two"}
    assert dvc_forms.lock_of(entries) == content
    assert dvc_forms.is_cut(content)  # it begins as DVC's do
    for cut in range(0, len(content), 7):
        assert dvc_forms.whole_entries(content[:cut]).items() <= entries.items()
    assert set(dvc_forms.recorded(entries, "one@a")["params"]["params.yaml"]) == {"lr"}


def test_the_lock_is_not_read_while_dvc_writes_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    whole = dvc_forms.LOCK.read_bytes()
    held = zc.lockfile.LockFile(str(dvc_forms.HELD))  # as DVC holds it

    def write() -> None:
        dvc_forms.LOCK.write_bytes(whole)
        held.close()

    dvc_forms.LOCK.write_bytes(whole[: len(whole) // 2])
    threading.Timer(0.3, write).start()
    assert dvc_forms.read_lock().keys() == {"one@a", "one@b", "two"}


def test_what_repro_says_of_its_stages_is_read(repository: Path) -> None:
    """Run, kept, restored, failed, killed; side by side, so that none gives up on the lock of another."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_"))}

    def repro(*stages: str, code: int = 0) -> str:
        command, said = (*dvc_forms.REPRO, *stages), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        dvc = subprocess.run(command, cwd=repository, env=environment, check=False, **said)
        assert dvc.returncode == code, dvc.stdout
        return dvc.stdout

    params = repository / "params.yaml"
    first = params.read_text()
    assert dvc_forms.went(repro("one@a", "one@b")) == {"one@a": "kept", "one@b": "kept"}
    params.write_text("lr: 7\n")
    assert dvc_forms.went(repro("one@a")) == {"one@a": "ran"}
    params.write_text(first)
    assert dvc_forms.went(repro("one@a")) == {"one@a": "restored"}
    yaml = repository / "dvc.yaml"
    whole = yaml.read_text()
    fails = "  {}:\n    cmd: 'echo MLflow is told; echo \"x: it is too wide\"; {}'\n    deps: [a.txt]\n    outs: [{}.txt]\n"
    yaml.write_text(whole + fails.format("bad", "exit 1", "bad") + fails.format("dies", "kill -9 $$", "dies"))
    said = repro("bad", "one@a", code=255)
    assert dvc_forms.went(said) == {"bad": "ran"}
    assert dvc_forms.trouble(said, 255) == "x: it is too wide"
    assert dvc_forms.trouble(repro("dies", code=255), 255) == "it was ended by SIGKILL"
    assert dvc_forms.trouble(repro("none", code=255), 255) == "Stage 'none' not found inside 'dvc.yaml' file"
    assert dvc_forms.trouble(said[:60], -15) == "DVC was ended by SIGTERM"
    yaml.write_text(whole)


def test_who_works_is_listed_as_it_is_read(repository: Path) -> None:
    write, read = dvc_forms.working(json.loads((repository / "rwlock.json").read_text()))
    assert {Path(path).name for path in write} == {"out.txt", "rwlock.json"}
    assert {"a.txt", "b.txt", "stage.py"} <= {Path(path).name for path in read}
    assert all("dvc" in who["cmd"] for who in write.values())


def test_a_temporary_tree_of_an_experiment_leads_back_to_where_it_was_made(repository: Path) -> None:
    assert (repository / "out.txt").read_text() == str(repository.resolve())
    (repository / "params.yaml").write_text("lr: 2\n")
    (repository / "stage.py").write_text((repository / "stage.py").read_text() + "pathlib.Path('/' + sys.argv[0])\n")
    call(repository, "git", "add", ".")
    call(repository, *DVC, "exp", "run", "-q", "--temp", "-n", f"x{time.time_ns()}")
    shown = subprocess.run(("git", "for-each-ref", "refs/exps"), cwd=repository, capture_output=True, text=True, check=True).stdout
    name = shown.split("/")[-1].strip()
    call(repository, *DVC, "exp", "apply", "-q", name)
    assert (repository / "out.txt").read_text() == str(repository.resolve())


def test_status_tells_of_what_changed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    (repository / "stage.py").write_text((repository / "stage.py").read_text() + "# changed\n")
    assert json.loads(dvc_forms.status().stdout) == {"two": [{"changed deps": {"stage.py": "modified"}}]}


def test_what_a_section_leaves_out_is_no_parameter_for_dvc_nor_here() -> None:
    values = params.read_yaml(ROOT / "params.yaml")
    values["data"]["mine"] = {"reader": "auto", "path": "x"}
    loaded = params.Params.model_validate(values)
    assert loaded.data["mine"].model_dump()["pad"] is True, "a default"
    stage = dvc_forms.stages()["fetch"]
    assert dvc_forms.params_of(stage, "mine", loaded) == {"data.mine": {"reader": "auto", "path": "x"}}
    assert dvc_forms.params_of(stage, "mnist", loaded) == {"data.mnist": values["data"]["mnist"]}
