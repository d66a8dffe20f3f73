"""What git is asked, whatever its settings; what is unknown where it cannot answer; what is kept secret."""

import re
import subprocess
from pathlib import Path

import pytest

from stages.tracking.git import commit, dirty, origins, uncommitted

ROOT = Path(__file__).parents[2]
MD5 = "0123456789abcdef0123456789abcdef"
LOCK = f"schema: '2.0'\nstages:\n  fetch@mnist:\n    cmd: x\n    outs:\n    - path: data/raw/mnist.fetched.zip\n      md5: {MD5}\n"
pytestmark = pytest.mark.usefixtures("empty")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(empty: Path) -> Path:
    """A repository with one commit of two decisive files and dvc.lock."""
    git("init", "-q")
    git("config", "--global", "user.name", "A")
    git("config", "--global", "user.email", "a@b.c")
    Path("stages").mkdir()
    Path("stages/train.py").write_text("one\n\ntwo\nthree\n")
    Path("params.yaml").write_text("lr: 1\n")
    Path("dvc.lock").write_text(LOCK)
    git("add", ".")
    git("commit", "-qm", "first")
    return empty / "work"


def change() -> None:
    Path("stages/train.py").write_text("one\n\n2\nthree\n")


def unknown() -> bool:
    return (commit(), uncommitted(), dirty()) == (None, None, "unknown")


def test_a_clean_tree_and_a_changed_one(repository: Path) -> None:
    assert commit() == git("rev-parse", "HEAD")
    assert (uncommitted(), dirty()) == ("", "false")
    change()
    assert "-two\n+2\n" in (uncommitted() or "")
    assert dirty() == "true"
    git("commit", "-qam", "second")
    assert dirty() == "false"


def test_outside_a_repository_all_is_unknown() -> None:
    assert unknown()
    assert origins() == {}


def test_without_a_commit_all_is_unknown() -> None:
    git("init", "-q")
    Path("params.yaml").write_text("lr: 1\n")
    assert unknown()
    git("add", ".")
    assert unknown()
    assert origins() == {}


def test_a_repository_of_another_owner_is_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dirty() == "false"
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert unknown()
    assert origins() == {}


def test_without_git_all_is_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert unknown()
    assert origins() == {}


def test_a_bare_repository_is_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git("clone", "-q", "--bare", ".", "bare")
    monkeypatch.chdir("bare")
    assert unknown()


def test_a_repository_that_does_not_hold_this_project_is_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("inside/stages").mkdir(parents=True)
    Path("inside/params.yaml").touch()
    Path(".gitignore").write_text("inside\n")
    monkeypatch.chdir("inside")
    assert unknown()


def test_a_broken_index_is_unknown_and_the_commit_not_guessed(repository: Path) -> None:
    Path(".git/index").write_bytes(b"broken")
    assert unknown()


def test_worktrees_and_submodules_answer(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git("worktree", "add", "-q", "../tree")
    git("init", "-q", "../outer")
    subprocess.run(
        ["git", "-C", "../outer", "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(repository), "sub"],
        check=True,
    )
    for folder in ("../tree", "../outer/sub"):
        monkeypatch.chdir(repository / folder)
        assert commit() == git("rev-parse", "HEAD")
        assert dirty() == "false"
        change()
        assert "+2\n" in (uncommitted() or "")


HOSTILE = {
    "color.ui": "always",
    "color.diff": "always",
    "diff.noprefix": "true",
    "diff.mnemonicPrefix": "true",
    "diff.renames": "copies",
    "diff.context": "0",
    "diff.interHunkContext": "9",
    "diff.algorithm": "patience",
    "diff.colorMoved": "zebra",
    "diff.suppressBlankEmpty": "true",
    "diff.submodule": "log",
    "diff.relative": "true",
    "diff.srcPrefix": "x/",
    "log.showSignature": "true",
    "log.decorate": "full",
    "log.follow": "true",
    "log.showRoot": "false",
    "log.mailmap": "true",
    "log.date": "human",
    "format.pretty": "oneline",
    "core.quotePath": "on",
    "core.pager": "echo paged;",
    "core.fsmonitor": "echo",
    "pager.diff": "echo paged;",
    "pager.log": "echo paged;",
    "status.short": "true",
    "status.showUntrackedFiles": "no",
}


def test_the_settings_of_a_person_change_nothing(repository: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change()
    Path("params.yaml").write_text("lr: 1\n\nname: نقش\n")
    Path("stages/نقش.py").touch()
    expected = commit(), uncommitted(), dirty(), origins()
    assert expected[3] == {MD5: {"results_commit": expected[0], "results_restore": f"git checkout {expected[0]} && dvc checkout"}}
    for name, value in HOSTILE.items():
        git("config", "--global", name, value)
    tool = empty / "tool.sh"
    tool.write_text('#!/bin/sh\necho "$1 --- Text"\n')
    tool.chmod(0o755)
    for name in ("diff.external", "diff.mine.textconv", "diff.mine.command", "gpg.program"):
        git("config", "--global", name, str(tool))
    (empty / "order").write_text("params.yaml\n")
    git("config", "--global", "diff.orderFile", str(empty / "order"))
    git("config", "--global", "core.attributesFile", str(empty / "attributes"))
    (empty / "attributes").write_text("* diff=mine\n")
    for name, value in {
        "GIT_EXTERNAL_DIFF": str(tool),
        "GIT_DIFF_OPTS": "-u1",
        "GIT_PAGER": "echo paged;",
        "LC_ALL": "de_DE.UTF-8",
    }.items():
        monkeypatch.setenv(name, value)
    assert "--- Text" in git("diff")  # they do change what a person sees
    assert (commit(), uncommitted(), dirty(), origins()) == expected


def test_the_patch_applies_to_the_commit(repository: Path) -> None:
    Path("stages/train.py").write_bytes("one\r\nنقش\n".encode())
    wanted = Path("stages/train.py").read_bytes()
    patch = uncommitted() or ""
    git("checkout", "-q", ".")
    subprocess.run(["git", "apply"], input=patch.encode(), check=True)
    assert Path("stages/train.py").read_bytes() == wanted


def test_of_files_that_git_does_not_track_the_names_are_kept_alone(repository: Path) -> None:
    for name in ("stages/mine.py", "stages/deep/er.py", "dvc.yaml", "stages/notes.txt", "stages/__pycache__/x.pyc", "other.py"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("private\n")
    patch = uncommitted() or ""
    assert dirty() == "true"
    assert re.findall("does not track (.*):", patch) == ["dvc.yaml", "stages/deep/er.py", "stages/mine.py"]
    assert "private" not in patch
    Path(".gitignore").write_text("*.py\n")  # code that git ignores runs all the same
    assert uncommitted() == patch


def test_secrets_do_not_reach_the_patch(repository: Path) -> None:
    Path("params.yaml").write_text("url: https://me:hunter2@host/x?token=abc123\napi_key: abc123\nlr: 1\n")
    patch = uncommitted() or ""
    assert "hunter2" not in patch
    assert "abc123" not in patch
    assert "+url: https://***@host/x?token=***\n+api_key: ***\n lr: 1\n" in patch
