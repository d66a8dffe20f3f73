import csv
import json

import numpy as np
import pytest
import torch

from stages import UserError, train
from stages.pipeline import checkpoint, params, paths

CELL = params.Cell("toy", "cosine", 8, 3)


@pytest.fixture
def sections(tmp_path, monkeypatch):
    """A toy dataset in an empty folder, and sections small enough to train on it in a second."""
    monkeypatch.chdir(tmp_path)
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (48, 1, 8, 8), generator=rng, dtype=torch.uint8)
    checkpoint.save_tensors(paths.prepared("toy") / "train.safetensors", {"images": images, "labels": torch.arange(48) % 2})
    (paths.prepared("toy") / "dataset.json").write_text(json.dumps({"class_names": ["a", "b"]}))
    network = {"stem_resolution": 8, "base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_levels": []}
    options = {
        "images": 64, "batch": 8, "lr": 1e-3, "warmup_images": 16, "grad_clip": 1.0, "label_dropout": 0.1,
        "precision": "fp32", "ema_halflife": 0.05, "validation_images": 16, "curve_points": 4, "deterministic": False,
    }  # fmt: skip
    return params.Diffusion(prediction="v", reference_size=8), params.Network(**network, conditional=True), params.Train(**options)


def bits(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_writes_weights_snapshots_previews_and_the_curve(sections):
    measured = train.main(CELL, *sections)
    folder = paths.weights(str(CELL))
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*.*")}
    averages = {"ema-25", "ema-50", "ema-75", "ema"}
    assert names == {f"{n}.safetensors" for n in averages | {"raw"}} | {f"previews/{n}.png" for n in averages}
    rows = list(csv.DictReader(paths.loss_curve(str(CELL)).open()))
    assert [int(row["images"]) for row in rows] == [16, 32, 48, 64]
    assert all(0.1 < float(row["train_loss"]) < 3 for row in rows)
    assert measured["images_per_sec"] > 0
    net, about = checkpoint.load_network(folder / "ema.safetensors")
    assert about["cell"] == str(CELL)
    assert about["diffusion"] == {"prediction": "v", "reference_size": 8}
    assert not net.training


def test_the_same_seed_gives_the_same_bits_and_another_does_not(sections):
    train.main(CELL, *sections)
    first = bits(paths.weights(str(CELL)))
    train.main(CELL, *sections)
    assert bits(paths.weights(str(CELL))) == first
    other = params.Cell("toy", "cosine", 8, 4)
    train.main(other, *sections)
    assert bits(paths.weights(str(other)))["ema.safetensors"] != first["ema.safetensors"]


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_nothing(sections, monkeypatch):
    target, calls = train.process.target, []

    def broken(*args):
        calls.append(0)
        return target(*args) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(train.process, "target", broken)
    with pytest.raises(UserError, match=r"the loss became nan at step 2; a lower train.lr"):
        train.main(CELL, *sections)
    assert not paths.weights(str(CELL)).exists()
    assert not paths.loss_curve(str(CELL)).exists()
    assert list(paths.weights(str(CELL)).parent.iterdir()) == []


def test_holding_out_everything_is_refused(sections):
    diffusion, network, options = sections
    with pytest.raises(UserError, match=r"train.validation_images = 48 must be less than the 48 images"):
        train.main(CELL, diffusion, network, options.model_copy(update={"validation_images": 48}))


def test_every_epoch_visits_every_image_once_whatever_the_batch():
    for batch in (1, 7, 10, 33):
        steps = -(-30 // batch)
        seen = torch.cat([train.batch_of_step(step, batch, 10, seed=0) for step in range(1, steps + 1)])[:30]
        for epoch in seen.split(10):
            assert sorted(epoch.tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:20].tolist()


def test_timesteps_are_stratified_and_uniform():
    rng = torch.Generator().manual_seed(0)
    t = torch.stack([train.stratified_timesteps(64, 8, rng) for _ in range(200)])
    assert np.bincount(t.flatten(), minlength=8).tolist() == [1600] * 8  # 64 / 8 in every batch, exactly
    assert train.stratified_timesteps(5, 1, rng).tolist() == [0] * 5


def test_learning_rate_warms_up_and_ends_near_zero(sections):
    options = sections[2]
    rates = [train.learning_rate(step, 8, options) for step in range(1, 9)]
    assert rates[0] == pytest.approx(options.lr / 2)
    assert max(rates) == rates[1] < options.lr
    assert 0 < rates[-1] < 0.05 * options.lr
