"""What `make repro` and `make prune` say before they do anything."""

import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from stages.errors import UserError
from stages.pipeline import params, paths
from stages.sweep import plan

ROOT = Path(__file__).parents[2]
CELL = "mnist-cosine-100-0"


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.mark.usefixtures("bare_tree")
def test_leftovers_are_what_the_sweep_does_not_name_and_trainings_nobody_works_on() -> None:
    kept = [
        paths.weights("mnist-cosine-0") / "ema.safetensors",
        paths.loss_curve("mnist-cosine-0"),
        paths.scores("reference", "mnist"),
    ]
    stale = [paths.loss_curve("mnist-cosine-7"), paths.scores("reference", "emnist"), paths.weights("mnist-cosine-7")]
    touch(*kept, *stale, paths.samples("mnist-cosine-7-0") / "grid.png")
    for name in ("held", "abandoned"):
        touch(Path(".state/checkpoints", name, "state.safetensors"), Path(".state/finished", name, "state.safetensors"))
    Path(".state/locks").mkdir()
    with FileLock(".state/locks/held.lock"):
        found = plan.leftovers(params.load())
    assert set(found) == {*stale, paths.samples("mnist-cosine-7-0"), Path(".state/checkpoints/abandoned")}


@pytest.mark.usefixtures("bare_tree")
def test_a_changed_stage_is_followed_by_what_reads_its_outputs() -> None:
    cell = f"sample@{CELL}"
    assert plan.with_followers({cell}) == [cell, f"evaluate@{CELL}", "compare"]
    assert plan.with_followers(set()) == []
    assert len(plan.with_followers({"prepare@mnist"})) == 3 + 2 + 6 * 2 + 1


@pytest.mark.usefixtures("bare_tree")
def test_a_second_repro_is_told_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "ERROR: '/x/m.json' is busy, it is being blocked by:\n  (PID 4711): dvc repro\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(UserError, match=r"another `dvc repro` \(process 4711\) works in this folder"):
        plan.plan()


@pytest.mark.parametrize("name", ["../params", "/etc/passwd", "../../etc/passwd", "", ".", "gpu.yaml", "*", "no\0"])
def test_a_profile_is_one_of_the_folder(bare_tree: Path, name: str) -> None:
    (bare_tree / "profiles").mkdir()
    (bare_tree / "profiles/gpu.yaml").write_text("train: {batch: 32}\n")
    before = (bare_tree / "params.yaml").read_bytes()
    with pytest.raises(UserError, match=r"there is no profile .*; there are: gpu"):
        plan.profile(name)
    assert (bare_tree / "params.yaml").read_bytes() == before
    plan.profile("gpu")
    assert params.load().train.batch == 32
