"""What decides a run key, and what a dvc.lock that is damaged does to who reads it."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from dvc.utils.serialize import dump_yaml

from stages.errors import UserError
from stages.pipeline import params
from stages.pipeline.params import Cell
from stages.tracking import provenance, runs

ROOT = Path(__file__).parents[2]
MD5 = "0123456789abcdef0123456789abcdef"
LOCK = f"schema: '2.0'\nstages:\n  fetch@mnist:\n    cmd: x\n    outs:\n    - path: data/raw/mnist.fetched.zip\n      md5: {MD5}\n"


@pytest.fixture
def tree(empty: Path) -> Path:
    """The stages and the parameters of the project, and a dvc.lock that knows the data of one dataset."""
    shutil.copytree(ROOT / "stages", "stages", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, name)
    Path("dvc.lock").write_text(LOCK)
    return empty / "work"


CELL = Cell("mnist", "cosine", 100, 0)
HERE: provenance.Machines = {}


def test_a_secret_in_a_parameter_is_masked_on_record_and_changes_no_key(tree: Path) -> None:
    def with_url(url: str) -> provenance.Tree:
        values = params.load().model_dump()
        archive = {**values["data"]["persian_archive"], "url": url}
        values["data"] = {**values["data"], "mnist": archive | {"licence": "of me:hunter2@host"}}
        return provenance.Tree(read.stages, read.lock, params.Params.model_validate(values))

    read = provenance.Tree.read()
    plain, secret = with_url("https://host/x.zip"), with_url("https://me:hunter2@host/x.zip?signature=abc")
    assert plain.key(CELL, HERE) == secret.key(CELL, HERE)
    logged = secret.chain_params(CELL)
    assert logged["data.mnist.url"] == "https://***@host/x.zip?signature=***"
    assert logged["data.mnist.licence"] == "of ***@host"
    assert logged["T"] == 100
    assert "hunter2" in str(secret._chain(CELL))  # what the key is made of


def test_a_run_says_that_git_could_not_answer(tree: Path) -> None:
    client = Mock()
    client.search_runs.return_value = []
    runs.claim(client, "1", provenance.Tree.read(), CELL, HERE)
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
    assert provenance.Tree.read().key(CELL, HERE)
    Path("dvc.lock").write_text(text)
    with pytest.raises(UserError, match=says) as told:
        provenance.Tree.read().key(CELL, HERE)
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
        for ask in (read.is_recorded, lambda cell, read=read: read.key(cell, HERE)):
            try:
                assert ask(CELL) is not True
            except UserError as error:
                said = str(error)
                assert "\n" not in said, end


def test_an_entry_without_parameters_or_outputs_is_not_recorded(tree: Path) -> None:
    for entry in ({"cmd": "x", "params": None}, {"cmd": "x", "deps": [], "outs": []}):
        dump_yaml("dvc.lock", {"schema": "2.0", "stages": {"fetch@mnist": entry}})
        assert provenance.Tree.read().is_recorded(CELL) is False
