"""What `make repro` says at its end of results that git holds."""

import json
import subprocess
from pathlib import Path

import pytest
from cells import CELL, OTHER, edit, make_files, record

from stages.pipeline import paths
from stages.sweep import committed
from stages.tracking import provenance
from stages.tracking.provenance import Tree


@pytest.fixture
def results(tree: Path) -> Path:
    """The results of one cell, in git."""
    record(CELL, last="evaluate")
    for command in (["init", "-q"], ["add", "dvc.lock", "metrics"], ["commit", "-qm", "Results"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@localhost", *command], check=True)
    return tree


def said(*cells: object) -> list[str]:
    return list(committed.lines(Tree.read(), cells or [CELL]))  # type: ignore[arg-type]


@pytest.mark.usefixtures("results")
def test_the_same_bits_are_told_in_a_line_and_others_by_how_far_their_scores_lie_apart() -> None:
    assert said() == ["1 of 1 cells have the committed bits."]
    make_files(CELL, fid=22.0)
    record(CELL, last="evaluate")
    assert said() == [
        "0 of 1 cells have the committed bits.",
        f"  {CELL}: FID 22, committed 20: 2.8 standard errors apart",  # each has an error of 0.5
    ]
    scores = paths.scores("evaluate", str(CELL))
    here = provenance.here()["train"][0]["processor"]
    edit(str(scores), lambda text: text.replace(here, "another one"))
    assert said()[1].endswith(
        f"2.8 standard errors apart; committed ones were made on {provenance.here()['train'][0]['processor']}"
    )
    assert said(CELL, OTHER)[0] == "0 of 1 cells have the committed bits."  # git holds nothing of the other cell
    assert said(OTHER) == []


@pytest.mark.usefixtures("tree")
def test_where_git_holds_nothing_nothing_is_said() -> None:
    record(CELL, last="evaluate")
    assert said() == []


@pytest.mark.parametrize("machines", ["[]", "null", '{"train": 3}'])
def test_a_score_of_another_form_in_git_is_told(results: Path, machines: str) -> None:
    path = paths.scores("evaluate", str(CELL))
    scores = json.loads(path.read_text())
    path.write_text(json.dumps(scores | {"machines": json.loads(machines)}))
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@localhost", "commit", "-qam", "Another form"], check=True)
    make_files(CELL, fid=22.0)
    record(CELL, last="evaluate")
    assert said() == ["0 of 1 cells have the committed bits.", f"  {CELL}: git holds no score of it that compares"]
