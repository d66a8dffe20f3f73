"""Drawing from Python: which image a seed, a number and a label give, what labels may be called, what is refused."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cells import make_network

from stages import sample
from stages.drawing.model import Model, class_number, listed, load
from stages.drawing.weights import load_tensors, tensors_sha256
from stages.errors import UserError
from stages.pipeline import params
from stages.pipeline.params import Cell

ROOT = Path(__file__).parents[2]
CELL = Cell("toy", "cosine", 50, 0)
PERSIAN = ("۰", "۱", "۵", "ا", "ب")
NETWORK = {"stem_resolution": 8, "base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_levels": []}


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_network(CELL, "a", "b", "c")
    return load(str(CELL))


def test_an_image_is_that_of_its_seed_number_and_label_alone(model):
    labels = [k * k % 3 for k in range(11)]
    images = model.draw(labels, chunk=4)
    assert images.shape == (11, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == 11
    assert torch.equal(model.draw(labels[:3], chunk=4), images[:3])
    assert torch.equal(model.draw(labels[3:9], first=3, chunk=4, workers=3), images[3:9])
    others = model.draw([label if i % 2 else (label + 1) % 3 for i, label in enumerate(labels)], chunk=4)
    assert torch.equal(others[1::2], images[1::2])
    assert (others[::2] != images[::2]).flatten(1).any(1).all()
    assert (model.draw(labels, chunk=4, seed=1) != images).flatten(1).any(1).all()
    assert torch.equal(model.draw(["a", "b", "b"], chunk=4), images[:3])


def test_the_defaults_are_those_of_the_sets_that_are_scored():
    set_of = params.load(ROOT / "params.yaml").sample
    defaults = {name: each.default for name, each in inspect.signature(Model.draw).parameters.items()}
    expected = set_of.model_dump(include={"seed", "guidance", "guidance_interval", "clip_x0", "precision", "chunk"})
    expected |= set_of.fast.model_dump() | {"variance": set_of.ancestral.variance}
    expected["guidance_interval"] = tuple(expected["guidance_interval"])
    assert {name: defaults[name] for name in expected} == expected


def test_images_are_those_of_the_scored_sets(model):
    set_of = params.load(ROOT / "params.yaml").sample
    path = Path("models/networks/toy-cosine-0/ema.safetensors")
    chain = sample.chain_of(CELL, set_of, path, [3, 2, 1])
    labels = sample.class_sequence(torch.arange(5), [3, 2, 1]).tolist()
    fast, ancestral = sample.ways(set_of, CELL.T)
    assert torch.equal(model.draw(labels), chain.draw(5, fast).images)
    assert torch.equal(model.draw(labels, sampler="ddpm", spacing="trailing", steps=50), chain.draw(5, ancestral).images)


def test_the_sha256_is_that_of_the_file(model):
    assert model.sha256 == tensors_sha256(*load_tensors(Path("models/networks/toy-cosine-0/ema.safetensors")))
    make_network(CELL, "a", "b", "d")
    assert load(str(CELL)).sha256 != model.sha256


@pytest.mark.parametrize(("levels", "schedule"), [("linear", "linear"), ("shared", "cosine")])
def test_a_file_is_drawn_at_the_levels_that_it_learnt(tmp_path, monkeypatch, levels, schedule):
    monkeypatch.chdir(tmp_path)
    path = make_network(Cell("toy", "linear", 1000, 0), "a", "b", levels=levels)
    drawn = load(path).draw([0, 1])
    path.rename("mine.safetensors")
    assert torch.equal(load("mine.safetensors").draw([0, 1]), drawn)
    make_network(Cell("toy", schedule, 1000, 0), "a", "b", levels=levels)
    assert torch.equal(load(f"toy-{schedule}-1000-0").draw([0, 1]), drawn)
    assert not torch.equal(load(f"toy-{schedule}-50-0").draw([0, 1]), drawn)


def test_a_label_is_a_name_then_a_number():
    assert [class_number(label, PERSIAN) for label in ("۵", "5", "٥", "ب", "4", "3", "0", 2)] == [2, 2, 2, 4, 4, 3, 0, 2]
    assert class_number("é", ["e", "\u00e9"]) == class_number("e\u0301", ["e", "\u00e9"]) == 1
    assert class_number("1", ["3", "2", "1"]) == 2  # a name, though it is a number too
    assert class_number(1, ["3", "2", "1"]) == 1
    assert class_number(torch.tensor(1), ["a", "b"]) == 1


@pytest.mark.parametrize("label", ["x", "", "99", "-1", "²", "9" * 5000, 5, -1])
def test_a_label_that_is_none_is_told_with_those_that_are(label):
    with pytest.raises(UserError, match=r"there is no class .*; there are: ۰ \(0\), ۱ \(1\), ۵ \(2\), ا \(3\), ب \(4\)$"):
        class_number(label, PERSIAN)


def test_where_names_are_numbers_no_other_number_is_a_class():
    with pytest.raises(UserError, match="there is no class '0'; there are: 1, 2, 3"):
        class_number("0", ["1", "2", "3"])
    assert listed([str(y) for y in range(60)]).endswith("48, 49 and 10 more")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sampler": "euler"}, "sampler = 'euler' must be one of ddim, ddpm, "),
        ({"spacing": "odd"}, "spacing = 'odd' must be one of trailing, "),
        ({"variance": "all"}, "variance = 'all' must be one of posterior, beta"),
        ({"precision": "fp16"}, "precision = 'fp16' must be one of fp32, bf16"),
        ({"steps": 51}, r"steps = 51 must lie in 1\.\.50, the T of toy-cosine-50-0"),
        ({"steps": 0}, r"steps = 0 must lie in 1\.\.50"),
        ({"seed": -1}, "seed = -1 must lie in"),
        ({"first": -1}, "first = -1 be 0 or more"),
        ({"chunk": 0}, "chunk = 0 must be 1 or more"),
        ({"guidance": -0.5}, "guidance = -0.5 0 or more"),
        ({"eta": 0.5}, "eta = 0.5 must be 0, or with ddim"),
        ({"labels": []}, "no labels"),
        ({"labels": ["d"]}, "there is no class 'd'; there are: a"),
    ],
)
def test_what_cannot_be_drawn_is_refused(model, settings, told):
    with pytest.raises(UserError, match=told):
        model.draw(**{"labels": [0], **settings})


@pytest.mark.parametrize(("sampler", "spacing"), [("heun", "trailing"), ("ddim", "karras")])
def test_from_a_zero_snr_some_ways_cannot_start(model, sampler, spacing):
    diffusion = {"prediction": "v", "reference_size": 28, "zero_terminal_snr": True}
    make_network(CELL, "a", "b", diffusion=diffusion)
    with pytest.raises(UserError, match="toy-cosine-50-0 starts at a zero SNR"):
        load(str(CELL)).draw([0], sampler=sampler, spacing=spacing)
    assert load(str(CELL)).draw([0], sampler="ddim", spacing="trailing").float().std() > 1


def test_a_network_without_labels_is_drawn_with_none(model):
    told = model.draw([0, None])
    assert not torch.equal(told, model.draw([0, 1]))
    make_network(CELL, "a", "b", network=NETWORK | {"conditional": False})
    untold = load(str(CELL))
    with pytest.raises(UserError, match="toy-cosine-50-0 was never told a label"):
        untold.draw([0])
    with pytest.raises(UserError, match=r"guidance = 0\.8 needs a network with and without labels"):
        untold.draw([None])
    assert untold.draw([None] * 3, guidance=0).shape == (3, 1, 8, 8)


def test_a_network_that_is_not_there_is_told(model):
    with pytest.raises(UserError, match=r"`make repro CELL=toy-linear-50-0` makes it; networks here: toy-cosine-0$"):
        load("toy-linear-50-0")
    for name in ("toy", "toy-cosine-0", "../toy-cosine-50-0", ""):
        with pytest.raises(UserError, match=r"is neither a cell, as mnist-cosine-1000-0 is, nor a \.safetensors file"):
            load(name)
    with pytest.raises(UserError, match=r"none\.safetensors is missing"):
        load("none.safetensors")
    make_network(Cell("toy", "linear", 20, 0), "a")
    with pytest.raises(UserError, match=r"toy-linear-20-0: .*T = 20"):
        load("toy-linear-20-0").draw([0])
    Path("bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"bad\.safetensors is damaged"):
        load("bad.safetensors")


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {"stages", "torch", "torchgen", "numpy", "safetensors", "typing_extensions", *sys.stdlib_module_names}:
            raise ModuleNotFoundError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
from stages.drawing.model import load
model = load("toy-cosine-50-0")
print(model.draw(["a", 2], seed=3).flatten().tolist())
for name in ("scipy", "pandas", "pydantic", "PIL", "mlflow", "dvc", "torchvision", "ruamel", "filelock", "tqdm"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} could be imported")
"""


def test_it_needs_torch_numpy_and_safetensors_alone(model):
    done = subprocess.run([sys.executable, "-c", ALONE], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{model.draw([0, 2], seed=3).flatten().tolist()}\n"
