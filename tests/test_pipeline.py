"""The whole pipeline for real, in a copy of the working tree: one tiny cell of drawn glyphs, then what may and may not rerun."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.repo import Repo
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from benchmarks.kills import CELL, PROFILE, ROOT, call, commit, copy_tree, environment
from stages.pipeline import params, paths
from stages.pipeline.params import Cell
from stages.sweep import warm
from stages.tracking import mirror, provenance

NETWORK = str(Cell(*CELL.split("-")[:2], T=8, seed=0).training)
TINY = PROFILE.replace("images: 2400", "images: 128")  # eight steps of training


FORKED: dict[str, str] = {}  # what leads DVC and stages to the process that they are forks of
SERVER = """
import os, sys
import dvc.cli, dvc.commands.repro, dvc.repo.reproduce, dvc.stage.cache
from stages.sweep import warm
os._exit(warm.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module", autouse=True)
def _forks() -> Iterator[None]:
    """One process for all of these tests, so that the libraries of DVC and of stages are imported once."""
    told = f"import os, time; print(os.environ[{warm.ADDRESS!r}], flush=True); time.sleep(3600)"
    command = [sys.executable, "-c", SERVER, sys.executable, "-c", told]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            FORKED[warm.ADDRESS] = server.stdout.readline().strip()
            yield
        finally:
            FORKED.clear()
            server.terminate()


def forked(folder: Path, module: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` in a folder as a fork, and what it starts too. Raises AssertionError at another exit code."""
    told = {"module": module, "arguments": arguments, "cwd": str(folder), "environment": environment() | FORKED}
    request = json.dumps(told).encode()
    with socket.socket(socket.AF_UNIX) as asker, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        asker.connect(f"\0{FORKED[warm.ADDRESS]}")
        with Path(os.devnull).open() as nothing:
            files = [nothing.fileno(), out.fileno(), err.fileno()]
            socket.send_fds(asker, [len(request).to_bytes(4, "big")], files)
        asker.sendall(request)
        assert asker.recv(1) == warm.BEGUN
        ended = asker.recv(1)[0]
        texts = [file.seek(0) or file.read() for file in (out, err)]
    done = subprocess.CompletedProcess(["python", "-m", module, *arguments], ended, *texts)
    assert ended == code, f"{done.args} ended with {ended}\n{done.stdout}\n{done.stderr}"
    return done


def repro(folder: Path, *options: str) -> str:
    """What `dvc repro` says."""
    return forked(folder, "dvc", "repro", *options).stdout


def changed(folder: Path) -> set[str]:
    """The stages that DVC finds out of date."""
    with Repo(str(folder)) as repo:
        return {name.rpartition(":")[2] for name in repo.status()}  # it puts the file before the name, seen from elsewhere


@contextlib.contextmanager
def edited(folder: Path, *edits: tuple[str, str, str]) -> Iterator[None]:
    """Files (path, before, after) changed for as long as the block lasts."""
    texts = {path: (folder / path).read_text() for path, _, _ in edits}
    try:
        for path, before, after in edits:
            text = (folder / path).read_text()
            assert before in text
            (folder / path).write_text(text.replace(before, after, 1))
        yield
    finally:
        for path, text in texts.items():
            (folder / path).write_text(text)


def results(folder: Path) -> dict[str, str]:
    """A hash of every file that must come again bit for bit."""
    places = ("data/raw", "data/prepared", "models", "samples", "metrics")
    files = [path for place in places for path in sorted((folder / place).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def runs(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("naqsh")
    assert experiment
    return list(client.search_runs([experiment.experiment_id]))


def contents(folder: Path) -> list[tuple[object, ...]]:
    """All that a second sync must leave as it is."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    every = []
    for run in sorted(runs(folder), key=lambda run: run.info.run_id):
        points = {name: len(client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics}
        every.append((run.info.run_id, run.info.status, run.data.params, run.data.metrics, run.data.tags, points))
    return every


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed copy of the working tree after its first run."""
    folder = tmp_path_factory.mktemp("work tree") / "naqsh"  # a path with a space
    copy_tree(folder, TINY)
    repro(folder)
    return folder


def test_first_run_makes_everything(tree: Path) -> None:
    for stage in params.read_yaml(tree / "dvc.yaml")["stages"].values():
        for path in paths.outs(stage):
            assert (tree / paths.of_item(path, paths.item_of(stage, CELL))).exists(), path
    summary = json.loads((tree / "metrics/summary.json").read_text())
    assert summary["persian_glyphs"]["fid"] > 0
    report = (tree / "metrics/report.md").read_text()
    assert "synthetic" in report
    for picture in [part.split(")")[0] for part in report.split("](")[1:]]:
        assert (tree / "metrics" / picture).stat().st_size > 1000


def test_second_run_does_nothing(tree: Path) -> None:
    assert "Data and pipelines are up to date." in repro(tree)


@pytest.mark.parametrize("share", [0.5, 0])
def test_a_lock_that_was_cut_off_costs_no_training(tree: Path, share: float) -> None:
    """It is in no commit yet: what its rest does not have comes from the run cache."""
    lock, results = tree / "dvc.lock", [tree / f"models/networks/{NETWORK}/ema.safetensors", tree / f"metrics/evaluate/{CELL}.json"]
    whole, before = lock.read_bytes(), [path.read_bytes() for path in results]
    lock.write_bytes(whole[: whole.index(b"hash: ", len(whole) // 2) + len("hash:")] if share else b"")  # in the middle of a line
    assert "mended" in forked(tree, "stages.sweep.plan", "plan").stderr
    said = repro(tree)
    assert f"Stage 'train@{NETWORK}' is cached - skipping run" in said
    assert "Running stage" not in said
    assert lock.read_bytes() == whole
    assert [path.read_bytes() for path in results] == before


def test_mlflow_holds_the_cell(tree: Path) -> None:
    (run,) = runs(tree)
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    assert run.info.run_name == CELL
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    named = {"dataset": "persian_glyphs", "schedule": "cosine", "T": "8", "seed": "0", "current": "true", "dirty": "false"}
    assert named.items() <= tags.items()
    assert tags["commit"] == call(tree, "git", "rev-parse", "HEAD").stdout.strip()
    wanted = {"train.images": "128", "data.persian_glyphs.size": "16", "network.channel_mult": "[1, 2]", "T": "8"}
    assert wanted.items() <= run.data.params.items()
    assert not any(name.startswith(("data.mnist", "runtime", "sweep")) for name in run.data.params)
    scores = json.loads((tree / f"metrics/evaluate/{CELL}.json").read_text())
    assert run.data.metrics["fid"] == scores["fast"]["fid"]["value"]
    assert run.data.metrics["real images/fid_floor"] == scores["fast"]["fid"]["floor"]
    clocked = {f"time and memory/{name}" for name in ("train_seconds", "sample_fast_images_per_sec", "evaluate_seconds")}
    assert {"eps_mse", "accuracy", "set in T steps/ancestral_accuracy", *clocked} <= run.data.metrics.keys()
    lines = (tree / f"metrics/train/{NETWORK}.csv").read_text().splitlines()
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [point.step for point in history] == [int(line.split(",")[0]) for line in lines[1:]]
    found = {item.path for name in ("samples", "data", "images") for item in client.list_artifacts(run.info.run_id, name)}
    assert {"samples/grid.png", "samples/chain.png", "samples/denoising.gif", "data/dataset.json"} <= found
    previews = sorted(int(path.split("+")[2]) for path in found if path.endswith(".webp"))
    assert previews == list(range(1 + len(history)))
    assert run.data.metrics["time and memory/train_images"] == 128
    assert run.inputs.dataset_inputs[0].dataset.name == "persian_glyphs"


def test_second_sync_adds_nothing_and_committed_results_are_found(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = contents(tree)
    assert mirror.sync()
    assert contents(tree) == before
    commit(tree, "Results")
    assert mirror.sync()
    (run,) = runs(tree)
    assert run.data.tags["results_commit"] == call(tree, "git", "rev-parse", "HEAD").stdout.strip()
    assert f"git checkout {run.data.tags['results_commit']}" in run.data.tags["results_restore"]


@pytest.mark.parametrize(
    ("path", "reruns"),
    [
        ("stages/fidelity/frechet.py", {"reference@persian_glyphs", f"evaluate@{CELL}"}),
        ("stages/networks/unet.py", {f"train@{NETWORK}", f"sample@{CELL}", f"evaluate@{CELL}"}),
        ("stages/diffusion/samplers/__init__.py", {f"sample@{CELL}"}),
        ("stages/diffusion/samplers/ddpm.py", {f"sample@{CELL}"}),
        ("stages/diffusion/samplers/heun.py", set()),
        (
            "stages/diffusion/schedules/cosine.py",
            {"prepare@persian_glyphs", f"train@{NETWORK}", f"sample@{CELL}", f"evaluate@{CELL}"},
        ),
        ("stages/diffusion/schedules/sigmoid.py", {"prepare@persian_glyphs"}),
        ("stages/tracking/mirror.py", set()),
    ],
)
def test_a_changed_file_reruns_what_depends_on_it(tree: Path, path: str, reruns: set[str]) -> None:
    before = (tree / path).read_bytes()
    try:
        (tree / path).write_bytes(before + b"\n# changed\n")
        assert changed(tree) == reruns
    finally:
        (tree / path).write_bytes(before)


def test_a_new_file_runs_only_what_uses_it(tree: Path) -> None:
    """A schedule in the sweep: its own cells. A sampler, once chosen: what it draws. A metric: what is measured."""
    science, sampler = tree / "stages/diffusion", "sampler: sde_dpm_solver_pp_2m"
    quick = science / "schedules/quick.py"
    files = [quick, science / "samplers/euler.py", tree / "stages/fidelity/unused.py"]
    try:
        quick.write_text((science / "schedules/cosine.py").read_text())
        files[1].write_text((science / "samplers/ddim.py").read_text())
        files[2].write_text('"""Nobody imports it."""\n')
        assert changed(tree) == set()
        new, network = CELL.replace("cosine", "quick"), NETWORK.replace("cosine", "quick")
        with edited(tree, ("params.yaml", "schedules: [cosine]", "schedules: [cosine, quick]")):
            assert changed(tree) == {f"train@{network}", f"sample@{new}", f"evaluate@{new}", "compare"}
        with edited(tree, ("params.yaml", sampler, "sampler: euler")):
            assert changed(tree) == {f"sample@{CELL}"}
            said = forked(tree, "stages.sweep.plan", "plan").stdout
            assert "To run: sample, evaluate, compare\n" in said
            assert "\n  sample: sample.fast.sampler is now euler (was sde_dpm_solver_pp_2m)\n" in said
        with edited(tree, ("params.yaml", sampler, "sampler: eulr")):
            refused = forked(tree, "stages.sweep.plan", "plan", code=1).stderr
            assert "sample.fast.sampler = 'eulr': input should be one of ddim, ddpm, dpm_solver_pp_2m, euler, heun" in refused
        files[2].write_text(METRIC)
        deps = "      - stages/fidelity/rounding.py\n      - stages/fidelity/sets.py\n"
        both = (tree / "dvc.yaml").read_text().replace(deps, f"{deps}      - stages/fidelity/unused.py\n")
        metrics = "stages/fidelity/metrics.py"
        lines = [(metrics, "METRICS = {\n", 'METRICS = {\n    "unused": Metric(unused),\n')]
        lines += [(metrics, "\nMeasured = ", "from stages.fidelity.unused import unused\n\nMeasured = ")]
        with edited(tree, *lines, ("dvc.yaml", (tree / "dvc.yaml").read_text(), both)):
            assert changed(tree) == {"reference@persian_glyphs", f"evaluate@{CELL}"}
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    assert changed(tree) == set()


METRIC = """\
from stages.fidelity.sets import Fake, Real


def unused(real: Real, fake: Fake) -> tuple[float, float]:
    return 1.0, 0.0
"""


def test_one_sampler_may_draw_both_sets(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then two deps are one file: DVC lists it twice, and finds nothing to do after."""
    monkeypatch.chdir(tree)
    first, cell = results(tree), params.find_cell(params.load(), CELL)
    with edited(tree, ("params.yaml", "sampler: sde_dpm_solver_pp_2m", "sampler: ddpm")):
        assert not provenance.Tree.read().is_recorded(cell, before="evaluate")
        assert f"Running stage 'sample@{CELL}'" in repro(tree, f"sample@{CELL}")
        assert (tree / "dvc.lock").read_text().count("path: stages/diffusion/samplers/ddpm.py") == 2
        assert provenance.Tree.read().is_recorded(cell, before="evaluate")
        assert changed(tree) == {f"evaluate@{CELL}", "compare"}
    assert "Running stage" not in repro(tree)
    assert results(tree) == first


def test_going_back_to_a_value_to_code_and_to_data_runs_nothing_again(tree: Path) -> None:
    first = results(tree)
    changes = [
        ("params.yaml", "grad_clip: 1.0", "grad_clip: 2.0"),
        ("params.yaml", "test_images: 64", "test_images: 65"),
        ("stages/diffusion/samplers/ddpm.py", '"""', '"""A remark. '),
    ]
    with edited(tree, *changes):
        there = repro(tree)
        assert {f"Running stage '{name}" in there for name in ("prepare@", "train@", "sample@", "evaluate@")} == {True}
        assert results(tree) != first
    back = repro(tree)
    assert back.count("is cached - skipping run, checking out outputs") >= 6
    assert "Running stage" not in back
    assert results(tree) == first


def test_a_cell_whose_parameters_change_while_it_trains_is_not_recorded_and_goes_on_when_they_are_taken_back(tree: Path) -> None:
    longer = ("params.yaml", "  images: 128 ", "  images: 3200 ")
    state = tree / ".state/checkpoints"
    with edited(tree, longer):
        with subprocess.Popen(
            ["dvc", "repro", f"train@{NETWORK}"],
            cwd=tree,
            env=environment() | FORKED,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as training:
            while not list(state.glob("*/state.safetensors")):
                assert training.poll() is None
                time.sleep(0.05)
            with edited(tree, ("params.yaml", "  images: 3200 ", "  images: 640 ")):
                said = training.communicate(timeout=500)[0]
        assert training.returncode
        assert "while this ran, train.images from 3200 to 640 changed: nothing is recorded" in said
        assert changed(tree) >= {f"train@{NETWORK}"}
        assert len(list(state.glob("*/state.safetensors"))) == 1
        assert "going on from step" in repro(tree, f"train@{NETWORK}")
    repro(tree)


@pytest.mark.parametrize("seeds", ['["0; touch PWNED"]', '["$(touch PWNED)"]', '["`touch PWNED`"]', '["0\\n touch PWNED"]'])
def test_no_parameter_reaches_a_shell(tree: Path, seeds: str) -> None:
    with edited(tree, ("params.yaml", "seeds: [0]", f"seeds: {seeds}")):
        said = forked(tree, "dvc", "repro", code=255).stderr
    assert not list(tree.rglob("PWNED*"))
    assert "sweep.seeds.0" in said


def test_a_persons_pictures_are_not_lost_wherever_they_lie(tree: Path) -> None:
    section = (
        "  letters: {reader: folder, path: PLACE, licence: x, size: 16, "
        "invert: false, pad: true, group: null, validation_share: 0.1, test_share: 0.3, seed: 0, strict: false}"
    )
    pictures = tree / "data/raw/letters"
    for y in "ab":
        for i in range(20):
            (pictures / y).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 10 * i + (y == "b")).save(pictures / y / f"{i}.png")
    sweep = ("params.yaml", "datasets: [persian_glyphs]", "datasets: [letters]")
    with edited(tree, sweep, ("params.yaml", "data:\n", f"data:\n{section.replace('PLACE', 'data/raw/letters')}\n")):
        repro(tree, "prepare@letters")
    assert len(list(pictures.rglob("*.png"))) == 40
    for place, says in (("data", "contains"), ("data/raw/letters.fetched.zip", "is")):
        with edited(tree, sweep, ("params.yaml", "data:\n", f"data:\n{section.replace('PLACE', place)}\n")):
            refused = forked(tree, "stages.sweep.engine", code=1)
            assert f"repro: data.letters.path = {place} {says} data/raw/letters.fetched.zip, which a stage writes" in refused.stderr
            assert "Running" not in refused.stdout
            assert f"data.letters.path = {place} {says}" in forked(tree, "dvc", "repro", "fetch@letters", code=255).stderr
        assert len(list(pictures.rglob("*.png"))) == 40
    call(tree, "git", "checkout", "-q", ".")
    for path in tree.glob("data/*/letters*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_failed_cell_shows_no_score_of_before(tree: Path) -> None:
    before = forked(tree, "stages.sweep.plan", "table").stdout
    assert before.count(CELL) == 1
    with edited(tree, ("params.yaml", "lr: 1.8e-2", "lr: 1.0e+6")):
        failed = forked(tree, "stages.sweep.engine", code=1)
    assert f"train@{NETWORK} failed: train: the loss became" in failed.stdout
    assert f"  left out, for they need it: {CELL}, compare\n" in failed.stdout
    assert f"Without results of the present code, parameters and data: {CELL}" in failed.stdout
    assert "FID" not in failed.stdout
    repro(tree)


def test_one_cell_is_made_alone_and_its_score_and_picture_are_told(tree: Path) -> None:
    with edited(tree, ("params.yaml", "draws: 2", "draws: 3")):
        said = forked(tree, "stages.sweep.engine", "--cell", CELL).stdout.splitlines()
        assert said[0] == "To run: evaluate"
        assert any(re.fullmatch(rf"cell 1 of 1: {CELL}  FID [\d.]+ ± [\d.]+ \(floor [\d.]+\)  scored", line) for line in said)
        told = said.index(f"Picture: samples/{CELL}/grid.png")
        assert re.fullmatch(rf"{CELL}  FID [\d.]+ ± [\d.]+ \(floor [\d.]+\)", said[told - 2])
        assert said[told - 1].startswith(
            "FID is how far 192 drawn images are from the real test images, lower is better; as many real"
        )
        assert f"  make draw CELL={CELL}  draws pictures with its network" in said
        assert changed(tree) == {"compare"}
    repro(tree)


@pytest.mark.slow
def test_two_at_a_time_give_the_bits_of_one_at_a_time(tmp_path: Path) -> None:
    every = []
    for jobs in ("1", "2"):
        copy_tree(folder := tmp_path / jobs, TINY.replace("schedules: [cosine]", "schedules: [cosine, sigmoid]"))
        said = call(folder, sys.executable, "-m", "stages.sweep.runner", "--jobs", jobs).stdout
        assert said.count("  trained") == 2
        every.append(results(folder))
        again = call(folder, sys.executable, "-m", "stages.sweep.runner", "--jobs", jobs).stdout
        assert again.startswith("Nothing to run: every result is up to date.\n")
        assert "Data and pipelines are up to date." in repro(folder), "as DVC sees it"
    assert every[0] == every[1]


@pytest.mark.slow
def test_a_clone_without_a_cache_gives_the_same_bits_and_skips_nothing_that_it_should_run(tree: Path, tmp_path: Path) -> None:
    commit(tree, "All results")
    call(tmp_path, "git", "clone", "-q", str(tree), "clone")
    said = repro(tmp_path / "clone")
    assert {f"Running stage '{name}" in said for name in ("prepare@", "train@", "sample@")} == {True}
    assert results(tmp_path / "clone") == results(tree)


def test_one_more_schedule_runs_only_the_new_cells(tree: Path) -> None:
    text = (tree / "params.yaml").read_text()
    assert "schedules: [cosine]" in text
    (tree / "params.yaml").write_text(text.replace("schedules: [cosine]", "schedules: [cosine, linear_unscaled]"))
    new, network = CELL.replace("cosine", "linear_unscaled"), NETWORK.replace("cosine", "linear_unscaled")
    assert changed(tree) == {f"train@{network}", f"sample@{new}", f"evaluate@{new}", "compare"}
    repro(tree)
    first, second = sorted(
        (run for run in runs(tree) if run.data.tags["current"] == "true"), key=lambda run: run.data.tags["schedule"]
    )
    assert [first.data.tags["naqsh.cell"], second.data.tags["naqsh.cell"]] == [CELL, new]
    assert second.data.tags["dirty"] == "true"
    patch = Path(second.info.artifact_uri.removeprefix("file://")) / "diff.patch"
    assert "linear_unscaled" in patch.read_text()
    rows = (tree / "metrics/summary.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["cell", CELL, new]
