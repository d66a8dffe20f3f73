import csv
import itertools
import json
import shutil
import subprocess
import sys
import typing
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stages import init, train
from stages.diffusion import process, schedules
from stages.drawing.network import load_network
from stages.errors import UserError
from stages.networks.balance import Balance
from stages.networks.unet import UNet
from stages.pipeline import checkpoint, params, paths
from stages.pipeline.stage import Listener

NETWORK = params.Training("toy", "cosine", 3)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def sections(tmp_path, monkeypatch):
    """A toy dataset in an empty folder, and sections small enough to train on it in a second."""
    monkeypatch.chdir(tmp_path)
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (48, 1, 8, 8), generator=rng, dtype=torch.uint8)
    save_splits(images, torch.arange(48) % 2, ["a", "b"])
    init.main(None)
    network = {"stem_resolution": 8, "base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_levels": []}
    options = {
        "shared": False, "timesteps": None, "init": None, "threads": 1, "images": 64, "longer": {}, "batch": 8,
        "optimizer": "muon", "lr": 1e-3, "halve_lr_every": None, "warmup_images": 16, "grad_clip": 1.0, "label_dropout": 0.1,
        "precision": "fp32", "ema_halflife": 0.05, "validation_images": 16, "curve_points": 4, "deterministic": False,
    }  # fmt: skip
    return (
        params.Diffusion(prediction="v", weighting="balanced", reference_size=8, zero_terminal_snr=False),
        params.Network(**network, conditional=True),
        params.Train(**options),
        params.Runtime(experiment="test", checkpoint_seconds=1e6),
        Mock(spec=Listener),
    )


def save_splits(images, labels, class_names):
    """Two of three images are to train on, the third to validate on."""
    rows = torch.arange(len(images)) % 3 == 2
    for name, chosen in (("train", ~rows), ("validation", rows)):
        tensors = {"images": images[chosen], "labels": labels[chosen]}
        checkpoint.save_tensors(paths.prepared("toy") / f"{name}.safetensors", tensors, class_names=class_names)


def changed(sections, **options):
    diffusion, network, old, *others = sections
    return diffusion, network, old.model_copy(update=options), *others


class Killed(BaseException):
    """What stops a training anywhere, with no chance to tidy up."""


@pytest.fixture
def killed_at(sections, monkeypatch):
    """Train, with a checkpoint after every step, until a step begins, and no further."""
    step_of = train.batch_of_step

    def run(last, arguments=sections):
        def batch_of_step(step, *rest):
            if step == last:
                raise Killed
            steps.append(step)
            return step_of(step, *rest)

        steps = []
        monkeypatch.setattr(train, "batch_of_step", batch_of_step)
        *rest, runtime, listener = arguments
        try:
            train.main(NETWORK, *rest, runtime.model_copy(update={"checkpoint_seconds": 0.0}), listener)
        except Killed:
            pass
        finally:
            monkeypatch.setattr(train, "batch_of_step", step_of)
        return steps

    return run


def results():
    return bits(paths.weights(str(NETWORK))), paths.loss_curve(str(NETWORK)).read_text()


def bits(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def learnt_weights(cell, name="ema"):
    """The tensors without the description that travels with them, which names the settings."""
    return checkpoint.load_tensors(paths.weights(str(cell)) / f"{name}.safetensors")[0]


def differ(one, other):
    return any(not torch.equal(one[name], other[name]) for name in one)


def test_writes_weights_previews_and_the_curve(sections):
    measured = train.main(NETWORK, *sections)
    folder = paths.weights(str(NETWORK))
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*.*")}
    weights = {f"{name}.safetensors" for name in ("ema", "raw")}
    assert names == weights | {"previews.zip"}
    with zipfile.ZipFile(folder / "previews.zip") as archive:
        assert archive.namelist() == [f"0000000{report}.png" for report in range(5)]
    rows = list(csv.DictReader(paths.loss_curve(str(NETWORK)).open()))
    assert [int(row["images"]) for row in rows] == [16, 32, 48, 64]
    assert all(0.1 < float(row["train_loss"]) < 3 for row in rows)
    assert measured["images_per_sec"] > 0
    assert [point["step"] for point in measured["by_step"]] == [2, 4, 6, 8]
    net, about = load_network(folder / "ema.safetensors")
    assert about["levels"] == NETWORK.schedule
    assert about["logsnr"] == pytest.approx([-28.2, 14.3], abs=0.1)
    assert about["machines"] == [checkpoint.machine()]
    assert about["diffusion"]["prediction"] == "v"
    assert not net.training


def test_the_same_seed_gives_the_same_bits_and_another_does_not(sections):
    train.main(NETWORK, *sections)
    first, learnt = bits(paths.weights(str(NETWORK))), learnt_weights(NETWORK)
    train.main(NETWORK, *sections)
    assert bits(paths.weights(str(NETWORK))) == first
    other = params.Training("toy", "cosine", 4)
    train.main(other, *sections)
    assert differ(learnt_weights(other), learnt)


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_nothing(sections, monkeypatch):
    target, calls = process.target, []

    def broken(*args):
        calls.append(0)
        return target(*args) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(process, "target", broken)
    with pytest.raises(UserError, match=r"the loss became nan at step 2; a lower train.lr"):
        train.main(NETWORK, *sections)
    assert not paths.weights(str(NETWORK)).exists()
    assert not paths.loss_curve(str(NETWORK)).exists()
    assert not list(checkpoint.workspace().glob(".state/checkpoints/*"))


def test_a_listener_hears_of_every_report(sections):
    train.main(NETWORK, *sections)
    points = [call.args for call in sections[-1].point.call_args_list]
    assert [(metrics["step"], share) for metrics, _, share, _ in points] == [(2, 0.25), (4, 0.5), (6, 0.75), (8, 1.0)]
    assert [picture.name for _, picture, _, _ in points] == [f"0000000{report}.png" for report in (1, 2, 3, 4)]
    assert all({"lr", "train_loss", "val_loss", "images_per_sec"} <= metrics.keys() for metrics, *_ in points)
    assert [seconds_left > 0 for *_, seconds_left in points] == [True, True, True, False]


def test_a_small_validation_split_is_taken_as_a_whole(sections):
    curves = []
    for n in (8, 16, 1000):
        train.main(NETWORK, *changed(sections, validation_images=n))
        curves.append(paths.loss_curve(str(NETWORK)).read_text())
    assert curves[0] != curves[1] == curves[2]


def test_a_training_begins_with_the_weights_of_another(sections, capsys):
    """After one tiny step the network is still near where it began."""
    other = params.Training("toy", "cosine", 4)
    train.main(other, *sections)
    first = learnt_weights(other)
    short = changed(sections, images=[8], curve_points=1, lr=1e-9, init="toy-cosine-5-4")
    init.main("toy-cosine-5-4")
    train.main(NETWORK, *short)
    again, about = checkpoint.load_tensors(paths.weights(str(NETWORK)) / "raw.safetensors")
    assert "toy-cosine-3: begins with the weights of toy-cosine-5-4\n" in capsys.readouterr().out
    assert about["train"]["init"] == "toy-cosine-5-4"
    assert len(about["init_sha256"]) == 64
    assert all(torch.allclose(again[name], first[name], atol=1e-5) for name in again)
    assert all(torch.allclose(learnt_weights(NETWORK)[name], first[name], atol=1e-5) for name in again)
    init.main(None)
    train.main(NETWORK, *changed(short, init=None))
    assert not all(torch.allclose(learnt_weights(NETWORK)[name], first[name], atol=1e-2) for name in again)
    assert "init_sha256" not in checkpoint.load_tensors(paths.weights(str(NETWORK)) / "raw.safetensors")[1]


def test_of_other_weights_to_begin_with_it_is_another_training(sections, killed_at, tmp_path):
    """What stands in init.safetensors decides the bits, so a checkpoint of a training with other weights does not go on."""
    train.main(NETWORK, *sections)
    for seed in ("raw", "ema"):
        shutil.copy(paths.weights(str(NETWORK)) / f"{seed}.safetensors", tmp_path / f"{seed}.safetensors")
    arguments = changed(sections, init="raw.safetensors")
    init.main(str(tmp_path / "raw.safetensors"))
    assert killed_at(5, arguments) == [1, 2, 3, 4]
    init.main(str(tmp_path / "ema.safetensors"))
    assert killed_at(3, arguments) == [1, 2]
    init.main(str(tmp_path / "raw.safetensors"))
    assert killed_at(9, arguments) == [5, 6, 7, 8]


def test_every_step_draws_its_own_noise_and_label_dropout_and_the_splits_are_kept_apart(sections, monkeypatch):
    """Images of one class lie together, each of one grey, by which it is recognised."""
    images = torch.arange(48, dtype=torch.uint8).reshape(48, 1, 1, 1).expand(48, 1, 8, 8)
    save_splits(images, torch.arange(48) // 12, list("abcd"))
    q_sample, forward = process.q_sample, UNet.forward
    trained, validated, noise, told = [], [], [], []

    def watched(x0, alpha_bar, eps):
        greys = ((x0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        (trained if torch.is_grad_enabled() else validated).extend(greys)
        if torch.is_grad_enabled():
            noise.append(eps)
        return q_sample(x0, alpha_bar, eps)

    def listening(self, x, logsnr, y):
        if torch.is_grad_enabled():
            told.extend(y.tolist())
        return forward(self, x, logsnr, y)

    monkeypatch.setattr(process, "q_sample", watched)
    monkeypatch.setattr(UNet, "forward", listening)
    for seed in (3, 4):
        train.main(
            params.Training("toy", "cosine", seed), *changed(sections, images=[1600], label_dropout=0.25, validation_images=12)
        )
    held_out = set(validated)
    assert [sum(grey // 12 == label for grey in held_out) for label in range(4)] == [3] * 4  # of every class its share
    assert held_out < set(range(2, 48, 3))
    assert set(trained) == set(range(48)) - set(range(2, 48, 3))
    assert {y for grey, y in zip(trained, told, strict=True) if y != grey // 12} == {4}  # the label, or none
    assert np.mean(np.array(told) == 4) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 3200) ** 0.5)
    values = torch.stack(noise)
    assert values.mean() == pytest.approx(0, abs=4 / values.numel() ** 0.5)
    assert values[:, 0, 0, 0, 0].unique().numel() == len(values) == 400  # 200 steps of either seed


def test_the_original_recipe_trains_without_an_average_under_adam(sections):
    diffusion, network, options, *others = sections
    options = options.model_copy(update={"optimizer": "adam", "halve_lr_every": 32, "ema_halflife": 0.0, "label_dropout": 0.0})
    network = network.model_copy(update={"conditional": False})
    train.main(NETWORK, diffusion.model_copy(update={"prediction": "eps"}), network, options, *others)
    average, raw = (checkpoint.load_tensors(paths.weights(str(NETWORK)) / f"{name}.safetensors")[0] for name in ("ema", "raw"))
    assert all(torch.equal(average[name], raw[name]) for name in raw)


def test_every_weighting_learns_something_else_and_nothing_else_differs(sections, monkeypatch):
    """Weights are compared, not files: these also name the weighting. Where it is ignored, all learn the same."""
    weightings = typing.get_args(params.Diffusion.model_fields["weighting"].annotation)
    assert len(weightings) == 4

    def learnt():
        found = []
        for weighting in weightings:
            train.main(NETWORK, sections[0].model_copy(update={"weighting": weighting}), *sections[1:])
            found.append(learnt_weights(NETWORK))
        return found

    assert all(differ(one, other) for one, other in itertools.combinations(learnt(), 2))
    monkeypatch.setattr(process, "loss_weights", lambda weighting, prediction, alpha_bar: torch.ones_like(alpha_bar))
    monkeypatch.setattr(Balance, "forward", lambda self, errors, t: errors)
    assert not any(differ(one, other) for one, other in itertools.combinations(learnt(), 2))


@pytest.mark.parametrize("last", [1, 2, 4, 7])
def test_killed_training_goes_on_to_the_bits_of_an_unbroken_one(sections, killed_at, last):
    train.main(NETWORK, *sections)
    unbroken = results()
    assert killed_at(last) == list(range(1, last))
    assert killed_at(None) == list(range(last, 9))  # a checkpoint after every step: none is taken twice
    assert results() == unbroken
    assert list(train.checkpoint.workspace().glob(".state/checkpoints/*")) == []


def test_kills_while_a_checkpoint_is_written_lose_one_interval(sections, killed_at, monkeypatch):
    train.main(NETWORK, *sections)
    unbroken = results()
    replace, replaced = Path.replace, []

    def replace_and_die(self, target):
        replaced.append(target)
        if len(replaced) == 7:
            raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_and_die)
    stopped = killed_at(None)
    monkeypatch.setattr(Path, "replace", replace)
    assert 1 < len(stopped) < 8
    assert killed_at(None)[0] >= stopped[-1]
    assert results() == unbroken


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: state.write_bytes(state.read_bytes()[:-100]), "is damaged"),
        (lambda state: state.write_bytes(b""), "is damaged"),
        (lambda state: checkpoint.save_tensors(state, {"x": torch.zeros(1)}, fingerprint="other"), "is of another training"),
    ],
)
def test_a_broken_or_foreign_checkpoint_is_refused_with_a_warning(sections, killed_at, capsys, spoil, says):
    train.main(NETWORK, *sections)
    unbroken = results()
    killed_at(5)
    (state,) = checkpoint.workspace().glob(".state/checkpoints/*/state.safetensors")
    spoil(state)
    assert killed_at(None) == list(range(1, 9))
    assert says in (told := capsys.readouterr().err)
    assert "starting over" in told
    assert results() == unbroken


def flip(file, where):
    """Turn over one bit of a file, at a share of its length."""
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1 << int(where * 1e6) % 8
    file.write_bytes(content)


def test_one_flipped_bit_of_an_unfinished_training_never_leads_to_other_bits(sections, killed_at, capsys):
    train.main(NETWORK, *sections)
    unbroken = results()
    killed_at(7)
    state = checkpoint.workspace() / ".state"
    shutil.copytree(state, kept := state.with_name("kept"))
    (folder,) = (state / "checkpoints").iterdir()
    files = [file.relative_to(folder) for file in folder.rglob("*.*") if file.is_file()]
    assert {file.name for file in files} >= {"state.safetensors", "00000003.png"}
    rng = np.random.default_rng(0)
    for file in (*[Path("state.safetensors")] * 4, Path("weights/previews/00000002.png")):
        shutil.rmtree(state)
        shutil.copytree(kept, state)
        flip(folder / file, rng.random())
        assert killed_at(None) == list(range(1, 9))
        assert results() == unbroken, file
        told = capsys.readouterr().err
        assert told.count("\n") == 1, file
        assert "starting over" in told


def test_one_flipped_bit_of_a_finished_training_never_leads_to_other_bits(sections, killed_at, capsys):
    longer = changed(sections, images=[64, 80])
    killed_at(None, longer)
    from_nothing = results()
    shutil.rmtree(state := checkpoint.workspace() / ".state")
    killed_at(None)
    (folder,) = (state / "finished").iterdir()
    files = [file.relative_to(folder) for file in folder.rglob("*.*") if file.is_file()]
    shutil.copytree(state, kept := state.with_name("kept"))
    rng = np.random.default_rng(0)
    for file in files[::3]:
        shutil.rmtree(state)
        shutil.copytree(kept, state)
        flip(folder / file, rng.random())
        assert killed_at(None, longer) == list(range(1, 19))
        assert results() == from_nothing, file
        assert capsys.readouterr().err.count("starting over") == 1


def test_a_shared_network_that_is_damaged_is_trained_again(sections, killed_at):
    shared = changed(sections, shared=True)
    assert killed_at(None, shared) == list(range(1, 9))
    first = results()
    (folder,) = checkpoint.workspace().glob(".state/finished/*")
    flip(folder / "state.safetensors", 0.9)
    assert killed_at(None, shared) == list(range(1, 9))
    assert killed_at(None, shared) == []
    (folder / "weights/previews/00000002.png").unlink()
    assert killed_at(None, shared) == list(range(1, 9))
    assert results() == first


def test_a_preview_that_changes_while_its_training_goes_on_does_not_reach_the_outs(sections, killed_at, monkeypatch):
    keep = train._keep

    def spoil(job):
        if job.state.step == 8:
            flip(job.weights / "previews/00000002.png", 0.9)
        keep(job)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_keep", spoil)
        with pytest.raises(UserError, match=r"00000002\.png is damaged .*; run `dvc repro` again"):
            train.main(NETWORK, *sections)
    assert not paths.weights(str(NETWORK)).exists()
    assert killed_at(None) == list(range(1, 9))


def test_a_state_without_a_hash_or_of_another_shape_is_not_gone_on_from(sections, killed_at, capsys):
    train.main(NETWORK, *sections)
    unbroken = results()
    killed_at(5)
    (state,) = checkpoint.workspace().glob(".state/checkpoints/*/state.safetensors")
    tensors, about = checkpoint.load_tensors(state)
    save_file(tensors, state, metadata={"about": json.dumps(about)})  # as an earlier version wrote it
    assert killed_at(5) == list(range(1, 5))
    assert "earlier version" in capsys.readouterr().err
    for spoilt in ({**tensors, "net/head.bias": torch.zeros(7)}, {key: tensors[key] for key in tensors if key != "losses"}):
        checkpoint.save_tensors(state, spoilt, **about)
        assert killed_at(5) == list(range(1, 5))
        assert "starting over" in capsys.readouterr().err
    assert killed_at(None) == list(range(5, 9))
    assert results() == unbroken


def test_other_settings_data_or_code_start_over(sections, killed_at, monkeypatch):
    killed_at(5)
    assert killed_at(3, changed(sections, lr=2e-3)) == [1, 2]
    for name in ("train", "validation"):
        path = paths.prepared("toy") / f"{name}.safetensors"
        split, _ = checkpoint.load_tensors(path)
        checkpoint.save_tensors(path, {"images": split["images"].flip(0), "labels": split["labels"]}, class_names=["a", "b"])
        assert killed_at(3) == [1, 2]
    monkeypatch.setattr(checkpoint, "md5", lambda path: "changed" if path.name == "unet.py" else "same")
    assert killed_at(3) == [1, 2]


def test_one_phase_more_goes_on_from_the_finished_ones_to_the_same_bits(sections, killed_at):
    longer = changed(sections, images=[64, 80])
    assert killed_at(None, longer) == list(range(1, 19))
    from_nothing = results()
    shutil.rmtree(checkpoint.workspace() / ".state")
    killed_at(None)
    assert killed_at(12, longer) == list(range(9, 12))  # steps 1..8 were the first phase
    assert killed_at(None, longer) == list(range(12, 19))
    assert results() == from_nothing
    rates = [float(row["lr"]) for row in csv.DictReader(paths.loss_curve(str(NETWORK)).open())]
    assert len(rates) == 8
    assert rates[4] > rates[3]  # a schedule of its own, to be seen in the curve
    assert differ(learnt_weights(NETWORK, "raw"), learnt_weights(NETWORK))


def test_a_dataset_that_trains_longer_does_so_in_every_phase(sections, killed_at):
    assert killed_at(None, changed(sections, images=[64, 80], longer={"toy": 2, "other": 3})) == list(range(1, 37))
    longer = results()
    shutil.rmtree(checkpoint.workspace() / ".state")
    assert killed_at(None, changed(sections, images=[128, 160], longer={"other": 3})) == list(range(1, 37))
    assert results() == longer


def test_a_shared_network_is_trained_once_for_all_schedules_of_a_dataset_and_seed(sections, killed_at, capfd, monkeypatch):
    shared = changed(sections, shared=True)
    with monkeypatch.context() as patch:  # killed between the end of the training and keeping it for the others
        patch.setattr(checkpoint, "finish", Mock(side_effect=Killed))
        assert killed_at(None, shared) == list(range(1, 9))
    assert killed_at(None, shared) == []
    first = results()
    for schedule in ("linear", "sigmoid"):
        train.main(other := params.Training("toy", schedule, NETWORK.seed), *shared)
        assert bits(paths.weights(str(other))) == first[0]
        assert paths.loss_curve(str(other)).read_text() == first[1]
    assert capfd.readouterr().out.count("takes the network that is trained already") == 3
    _, about = load_network(paths.weights(str(NETWORK)) / "ema.safetensors")
    assert about["train"]["shared"]
    assert about["levels"] == "shared"
    shutil.rmtree(checkpoint.workspace() / ".state")
    train.main(params.Training("toy", "linear", NETWORK.seed), *shared)  # without what was kept: trained again, to the same bits
    assert bits(paths.weights("toy-linear-3")) == first[0]
    train.main(params.Training("toy", "linear", NETWORK.seed + 1), *shared)
    assert differ(learnt_weights("toy-linear-4"), learnt_weights(NETWORK))


def test_the_levels_of_a_shared_network_hold_those_of_every_schedule():
    """Between two neighbours of them the log-SNR moves by less than a network can tell."""
    how = {"size": 28, "reference_size": 28, "zero_terminal_snr": False}
    levels = process.logsnr(torch.from_numpy(train.shared_levels(**how)))
    for name in schedules.names():
        asked = process.logsnr(torch.from_numpy(train.noise_levels(name, 1000, **how)))
        inside = asked[asked.abs() < 12]
        assert len(inside) > 980
        assert (levels[None] - inside[:, None]).abs().min(1).values.max() < 0.02


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_training_is_known_by_covers_the_code_that_it_depends_on(sections, shared, monkeypatch):
    """A shared network is the same whatever schedule it is of."""
    known = []

    def watched(files, *values):
        known.append({str(file.relative_to(ROOT)) for file in files if file.suffix == ".py"})
        return fingerprint(files, *values)

    fingerprint = checkpoint.fingerprint
    monkeypatch.setattr(checkpoint, "fingerprint", watched)
    train.main(NETWORK, *changed(sections, shared=shared))
    stage = params.read_yaml(ROOT / "dvc.yaml")["stages"]["train"]
    deps = {dep for dep in paths.deps(stage, str(NETWORK), {}) if dep.endswith(".py")}
    own = f"stages/diffusion/schedules/{NETWORK.schedule}.py"
    assert own in deps
    assert known[0] == (deps - {own} if shared else deps)


def test_a_second_writer_waits(sections, killed_at, capfd):
    killed_at(3)
    (folder,) = checkpoint.workspace().glob(".state/checkpoints/*")
    code = "import sys, time; from filelock import FileLock\nwith FileLock(sys.argv[1]): print(flush=True); time.sleep(1)"
    lock = folder.parents[1] / "locks" / f"{folder.name}.lock"
    with subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert killed_at(None) == list(range(3, 9))
        assert "waiting for it to end" in capfd.readouterr().err


def test_a_curve_has_whole_numbers_to_the_last_digit(tmp_path):
    train._write_curve(
        tmp_path / "curve.csv", [{"step": 1234567, "images": 79012288, "lr": 0.0123456789, "train_loss": 0.5, "val_loss": 0.25}]
    )
    assert (tmp_path / "curve.csv").read_text().splitlines()[1] == "1234567,79012288,0.0123457,0.5,0.25"
