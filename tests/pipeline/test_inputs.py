"""A stage ends well only with the code, parameters and data that it began with."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.errors import ChangedError, UserError
from stages.pipeline import checkpoint, inputs, stage

ROOT = Path(__file__).parents[2]
TRAIN = Path("data/prepared/mnist/train.safetensors")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> inputs.Inputs:
    """The inputs of a training, in a folder of its own, as they were when it began."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "train@mnist-cosine-100-0")
    TRAIN.parent.mkdir(parents=True)
    TRAIN.write_text("images")
    found = inputs.Inputs()
    found.look()
    monkeypatch.setattr(inputs, "STARTED", found)
    return found


def edit(path: str | Path, change: Callable[[str], str]) -> None:
    before = Path(path).read_text()
    Path(path).write_text(change(before))
    assert Path(path).read_text() != before


@pytest.mark.parametrize(
    ("path", "change", "says"),
    [
        ("params.yaml", lambda text: text.replace("grad_clip: 1.0", "grad_clip: 2.0"), ["train.grad_clip from 1.0 to 2.0"]),
        ("params.yaml", lambda text: text.replace("{persian_glyphs: 2}", "{}"), ["train.longer.persian_glyphs from 2 to None"]),
        ("params.yaml", lambda text: text + "\n[", ["params.yaml"]),
        ("stages/train.py", lambda text: text + "# changed\n", ["stages/train.py"]),
        ("stages/networks/unet.py", lambda text: text + "# changed\n", ["stages/networks/unet.py"]),
        ("stages/diffusion/schedules/cosine.py", lambda text: text + "#\n", ["stages/diffusion/schedules/cosine.py"]),
        (TRAIN, lambda text: text + "!", [str(TRAIN)]),
    ],
)  # fmt: skip
def test_a_change_is_named(started: inputs.Inputs, path: str, change: Callable[[str], str], says: list[str]) -> None:
    assert started.changed() == []
    edit(path, change)
    assert started.changed() == says
    with pytest.raises(ChangedError, match=f"while this ran, .*{Path(says[0].split()[0]).name}.* changed: nothing is recorded"):
        stage.check_unchanged()


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("params.yaml", lambda text: text.replace("min_scored: 500", "min_scored: 501")),
        ("params.yaml", lambda text: text.replace("grad_clip: 1.0", "grad_clip: 1.0 # of the norm")),
        ("params.yaml", lambda text: text.replace("experiment: naqsh", "experiment: other")),
        ("stages/evaluate.py", lambda text: text + "# changed\n"),
        ("stages/diffusion/schedules/linear.py", lambda text: text + "# changed\n"),
        ("stages/sweep/plan.py", lambda text: text + "# changed\n"),
    ],
)
def test_what_is_not_of_this_stage_may_change(started: inputs.Inputs, path: str, change: Callable[[str], str]) -> None:
    edit(path, change)
    assert started.changed() == []


def test_a_choice_that_is_made_anew_is_a_changed_parameter_and_the_file_that_was_chosen_stays_watched(
    started: inputs.Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "sample@mnist-cosine-100-0")
    chosen = "stages/diffusion/samplers/sde_dpm_solver_pp_2m.py"
    edit("params.yaml", lambda text: text.replace("sampler: sde_dpm_solver_pp_2m", "sampler: heun"))
    edit("stages/diffusion/samplers/heun.py", lambda text: text + "# changed\n")
    edit(chosen, lambda text: text + "# changed\n")
    assert started.changed() == [chosen, "sample.fast.sampler from sde_dpm_solver_pp_2m to heun"]


@pytest.mark.usefixtures("started")
def test_a_removed_input_is_a_change() -> None:
    TRAIN.unlink()
    assert inputs.STARTED.changed() == [str(TRAIN)]


def test_without_dvc_nothing_is_watched(started: inputs.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE")
    found = inputs.Inputs()
    found.look()
    edit("params.yaml", lambda text: text.replace("grad_clip: 1.0", "grad_clip: 2.0"))
    assert found.changed() == []


@pytest.mark.usefixtures("started")
def test_a_training_whose_settings_change_keeps_its_checkpoint_and_one_that_cannot_go_on_does_not() -> None:
    with checkpoint.unfinished("x") as folder:
        (folder / "state").touch()
    assert not folder.exists()

    def fail() -> None:
        raise UserError("the loss became nan")

    def change() -> None:
        edit("params.yaml", lambda text: text.replace("grad_clip: 1.0", "grad_clip: 2.0"))

    def train(meanwhile: Callable[[], None]) -> None:
        with checkpoint.unfinished("x") as folder:
            (folder / "state").touch()
            meanwhile()

    with pytest.raises(UserError, match="nan"):
        train(fail)
    assert not folder.exists()
    with pytest.raises(ChangedError, match="grad_clip"):
        train(change)
    assert (folder / "state").exists()


def test_the_cell_is_what_dvc_says(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "x; touch PWNED"
    for told, known in (("train@a-b-1-0", "a-b-1-0"), (f"cells/dvc.yaml:train@{hostile}", hostile), ("sample@a", None)):
        monkeypatch.setitem(os.environ, "DVC_STAGE", told)
        assert stage.told_by_dvc("train") == known
    monkeypatch.delitem(os.environ, "DVC_STAGE")
    assert stage.told_by_dvc("train") is None
