"""What git is asked, whatever its settings; what is unknown where it cannot answer; what is kept secret."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from dvc.utils.serialize import dump_yaml

from stages import UserError, masked
from stages.pipeline import params, provenance, tracking
from stages.pipeline.params import Cell

ROOT = Path(__file__).parents[2]
MD5 = "0123456789abcdef0123456789abcdef"
LOCK = f"schema: '2.0'\nstages:\n  fetch@mnist:\n    cmd: x\n    outs:\n    - path: data/raw/mnist.fetched.zip\n      md5: {MD5}\n"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and a git without settings."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


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
    return (provenance.commit(), provenance.uncommitted(), provenance.dirty()) == (None, None, "unknown")


def test_a_clean_tree_and_a_changed_one(repository: Path) -> None:
    assert provenance.commit() == git("rev-parse", "HEAD")
    assert (provenance.uncommitted(), provenance.dirty()) == ("", "false")
    change()
    assert "-two\n+2\n" in (provenance.uncommitted() or "")
    assert provenance.dirty() == "true"
    git("commit", "-qam", "second")
    assert provenance.dirty() == "false"


def test_outside_a_repository_all_is_unknown() -> None:
    assert unknown()
    assert provenance.origins() == {}


def test_without_a_commit_all_is_unknown() -> None:
    git("init", "-q")
    Path("params.yaml").write_text("lr: 1\n")
    assert unknown()
    git("add", ".")
    assert unknown()
    assert provenance.origins() == {}


def test_a_repository_of_another_owner_is_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.dirty() == "false"
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert unknown()
    assert provenance.origins() == {}


def test_without_git_all_is_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert unknown()
    assert provenance.origins() == {}


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
        assert provenance.commit() == git("rev-parse", "HEAD")
        assert provenance.dirty() == "false"
        change()
        assert "+2\n" in (provenance.uncommitted() or "")


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
    expected = provenance.commit(), provenance.uncommitted(), provenance.dirty(), provenance.origins()
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
    assert (provenance.commit(), provenance.uncommitted(), provenance.dirty(), provenance.origins()) == expected


def test_the_patch_applies_to_the_commit(repository: Path) -> None:
    Path("stages/train.py").write_bytes("one\r\nنقش\n".encode())
    wanted = Path("stages/train.py").read_bytes()
    patch = provenance.uncommitted() or ""
    git("checkout", "-q", ".")
    subprocess.run(["git", "apply"], input=patch.encode(), check=True)
    assert Path("stages/train.py").read_bytes() == wanted


def test_of_files_that_git_does_not_track_the_names_are_kept_alone(repository: Path) -> None:
    for name in ("stages/mine.py", "stages/deep/er.py", "dvc.yaml", "stages/notes.txt", "stages/__pycache__/x.pyc", "other.py"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("private\n")
    patch = provenance.uncommitted() or ""
    assert provenance.dirty() == "true"
    assert re.findall("does not track (.*):", patch) == ["dvc.yaml", "stages/deep/er.py", "stages/mine.py"]
    assert "private" not in patch
    Path(".gitignore").write_text("*.py\n")  # code that git ignores runs all the same
    assert provenance.uncommitted() == patch


def test_secrets_do_not_reach_the_patch(repository: Path) -> None:
    Path("params.yaml").write_text("url: https://me:hunter2@host/x?token=abc123\napi_key: abc123\nlr: 1\n")
    patch = provenance.uncommitted() or ""
    assert "hunter2" not in patch
    assert "abc123" not in patch
    assert "+url: https://***@host/x?token=***\n+api_key: ***\n lr: 1\n" in patch


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("url = https://me:pa/ss@host/x.zip?token=abc&file=a.zip", "url = https://***@host/x.zip?token=***&file=a.zip"),
        ("url = https://me:p@ss@host/x", "url = https://***@host/x"),
        ("https://ghp@host/a", "https://***@host/a"),
        ("me:hunter2@host/x", "***@host/x"),
        ("x?X-Amz-Signature=ab&X-Amz-Credential=c/d&b=1", "x?X-Amz-Signature=***&X-Amz-Credential=***&b=1"),
        ("url = https://host/x?token=abc: no answer", "url = https://host/x?token=***: no answer"),
        ("x?sv=1&sig=a%2Fb", "x?sv=1&sig=***"),
        ("+    password: hunter2", "+    password: ***"),
        ('+  "api_key": "abc def",', '+  "api_key": ***,'),
        ("+API_TOKEN=abc", "+API_TOKEN=***"),
        ("+AWS_SECRET_ACCESS_KEY = 'abc'", "+AWS_SECRET_ACCESS_KEY = ***"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("aws AKIAABCDEFGHIJKLMNOP", "aws ***"),
        (
            "+ -----BEGIN RSA PRIVATE KEY-----\n+abc\n+-----END RSA PRIVATE KEY-----\n+x",
            "+ -----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----\n+x",
        ),
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert str(UserError(text)) == shown
    assert masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "@@ -1,3 +1,3 @@ def f():",
        "see https://host/a@b and a@b.c",
        "git@github.com:me/x.git",
        "http://127.0.0.1:5000/#/x@y",
        "+def f(token: str, key: int) -> None:",
        "+    token = scanner.next(x)",
        "+    key = tree.key(cell)",
        f"sha256 = {MD5}",
        "token: null",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize("piece", ["a", "://a:", "?token", "token='", "-----BEGIN PRIVATE KEY-----", "eyJ", "a:"])
def test_masking_takes_no_longer_than_the_text(piece: str) -> None:
    started = time.process_time()
    masked(piece * (200_000 // len(piece)))
    assert time.process_time() - started < 3


@pytest.fixture
def tree(empty: Path) -> Path:
    """The stages and the parameters of the project, and a dvc.lock that knows the data of one dataset."""
    shutil.copytree(ROOT / "stages", "stages", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, name)
    Path("dvc.lock").write_text(LOCK)
    return empty / "work"


CELL = Cell("mnist", "cosine", 200, 0)


def test_a_secret_in_a_parameter_is_masked_on_record_and_changes_no_key(tree: Path) -> None:
    def with_url(url: str) -> provenance.Tree:
        values = params.load().model_dump()
        archive = {**values["data"]["persian_archive"], "url": url}
        values["data"] = {**values["data"], "mnist": archive | {"licence": "of me:hunter2@host"}}
        return provenance.Tree(read.stages, read.lock, params.Params.model_validate(values))

    read = provenance.Tree.read()
    plain, secret = with_url("https://host/x.zip"), with_url("https://me:hunter2@host/x.zip?signature=abc")
    assert plain.key(CELL) == secret.key(CELL)
    logged = secret.chain_params(CELL)
    assert logged["data.mnist.url"] == "https://***@host/x.zip?signature=***"
    assert logged["data.mnist.licence"] == "of ***@host"
    assert logged["T"] == 200
    assert "hunter2" in str(secret._chain(CELL))  # what the key is made of


def test_a_run_says_that_git_could_not_answer(tree: Path) -> None:
    client = Mock()
    tracking._create(client, "1", provenance.Tree.read(), CELL)
    tags = client.create_run.call_args.kwargs["tags"]
    assert tags["dirty"] == "unknown"
    assert not [name for name in tags if "commit" in name]
    client.log_text.assert_not_called()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LOCK.replace("  fetch", "<<<<<<< HEAD\n  fetch") + "=======\n>>>>>>> other\n", "conflict markers"),
        (LOCK[: LOCK.index("      md5")], "md5"),
        (LOCK[: LOCK.index(" data/raw")], "is damaged"),
        (LOCK[: LOCK.index("outs:") + 2], "not YAML"),
        (LOCK.replace("    outs:\n", "    outs: 3\n").partition("    - path")[0], "is damaged"),
        ("schema: '2.0'\nstages:\n  fetch@mnist:\n  - 1\n", "is damaged|not YAML"),
        ("schema: '2.0'\nstages:\n  fetch@mnist:\n", "is damaged"),
        ("", "does not record data/raw/mnist.fetched.zip"),
        ("[1]", "does not record data/raw/mnist.fetched.zip"),
    ],
)
def test_a_damaged_lock_is_told_in_one_line(tree: Path, text: str, says: str) -> None:
    assert provenance.Tree.read().key(CELL)
    Path("dvc.lock").write_text(text)
    with pytest.raises(UserError, match=says) as told:
        provenance.Tree.read().key(CELL)
    assert "dvc.lock" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_lock_that_is_no_text_or_a_folder_is_told_in_one_line(tree: Path) -> None:
    Path("dvc.lock").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"dvc\.lock is damaged .*; `git checkout dvc\.lock`"):
        provenance.Tree.read()
    Path("dvc.lock").unlink()
    Path("dvc.lock").mkdir()
    with pytest.raises(UserError, match=r"dvc\.lock is damaged"):
        provenance.Tree.read()


def test_a_lock_cut_anywhere_is_no_traceback(tree: Path) -> None:
    whole = (ROOT / "dvc.lock").read_text()
    start = whole.index("  prepare@mnist")
    for end in range(start, start + 1500, 101):
        Path("dvc.lock").write_text(whole[:end])
        read = provenance.Tree.read()
        for ask in (read.is_recorded, read.key):
            try:
                assert ask(CELL) is not True
            except UserError as error:
                said = str(error)
                assert "\n" not in said, end


def test_an_entry_without_parameters_or_outputs_is_not_recorded(tree: Path) -> None:
    for entry in ({"cmd": "x", "params": None}, {"cmd": "x", "deps": [], "outs": []}):
        dump_yaml("dvc.lock", {"schema": "2.0", "stages": {"fetch@mnist": entry}})
        assert provenance.Tree.read().is_recorded(CELL) is False
