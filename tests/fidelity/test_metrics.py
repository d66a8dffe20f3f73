"""What holds for every metric; one that is added is tested by being added."""

import math
from dataclasses import replace

import pytest
import torch
from made_up import fake_of, images, real_of

from stages.fidelity.metrics import METRICS, Score
from stages.fidelity.sets import Fake

SPLIT = images(300, seed=0)
ROUNDING = 1e-6  # of eigenvalues that should be 0: see test_frechet.py
MIRRORED = {"fid": "fid", "class_tv": "class_tv", "precision": "recall", "recall": "precision"}

every_metric = pytest.mark.parametrize("name", METRICS)


def measure(name: str, real: Fake, fake: Fake) -> tuple[float, float]:
    return METRICS[name].measure(real_of(real), fake)


def worse(good: Fake) -> Fake:
    """Far from all real images, of one class, not sure of it, and asked for as another one."""
    n, classes = good.probabilities.shape
    seen = torch.tensor([0.5] + [0.5 / (classes - 1)] * (classes - 1)).double()
    return Fake(good.features + 50, seen.expand(n, -1), torch.ones_like(good.labels))


@every_metric
def test_identical_sets_score_nothing_or_all_and_a_worse_one_is_far_from_that(name: str) -> None:
    value, _ = measure(name, SPLIT, SPLIT)
    ideal = round(value)
    assert ideal in (0, 1)
    assert value == pytest.approx(ideal, abs=ROUNDING)
    value, _ = measure(name, SPLIT, worse(SPLIT))
    assert abs(value - ideal) > 0.5
    assert value > 0 or ideal == 1


@every_metric
def test_a_set_of_other_images_scores_between_identical_and_worse(name: str) -> None:
    other = images(300, seed=1)
    scores = [measure(name, SPLIT, fake)[0] for fake in (SPLIT, other, worse(other))]
    assert sorted(scores) in (scores, scores[::-1])


@every_metric
def test_the_order_of_the_samples_does_not_matter(name: str) -> None:
    fake = images(300, seed=1, sure=0.8)
    fake = replace(fake, labels=fake.labels.roll(1))
    order = torch.randperm(fake.n, generator=torch.Generator().manual_seed(0))
    shuffled = Fake(fake.features[order], fake.probabilities[order], fake.labels[order])
    assert measure(name, SPLIT, shuffled)[0] == pytest.approx(measure(name, SPLIT, fake)[0], rel=1e-9)


@every_metric
@pytest.mark.parametrize("n", [5, 300])
def test_errors_are_finite_and_not_negative_and_repeat_themselves(name: str, n: int) -> None:
    fake = images(n, seed=1)
    for drawn in (fake, worse(fake)):
        value, error = measure(name, SPLIT, drawn)
        assert math.isfinite(value)
        assert math.isfinite(error)
        assert error >= 0
        assert (type(value), type(error)) == (float, float)  # JSON knows no numpy
        assert measure(name, SPLIT, replace(drawn)) == (value, error)


@every_metric
def test_images_are_left_as_they_were(name: str) -> None:
    fake = images(50, seed=1)
    before = [x.clone() for x in (fake.features, fake.probabilities, fake.labels)]
    measure(name, SPLIT, fake)
    assert all(map(torch.equal, before, (fake.features, fake.probabilities, fake.labels)))


@pytest.mark.parametrize("name", MIRRORED)
def test_what_is_symmetric_and_what_mirrors_what(name: str) -> None:
    wide = images(300, seed=1)
    a, b = SPLIT, replace(wide, features=2 * wide.features)
    assert measure(name, a, b)[0] == pytest.approx(measure(MIRRORED[name], b, a)[0], rel=1e-6)
    assert measure("precision", a, b)[0] != pytest.approx(measure("precision", b, a)[0], rel=0.1)


def test_the_ratio_of_real_images_is_what_is_said_to_be_its_floor() -> None:
    real = replace(SPLIT, probabilities=torch.cat([images(200, 2).probabilities, images(100, 3, sure=0.7).probabilities]))
    assert measure("confident", real, real)[0] == pytest.approx(2 / 3)
    assert measure("confident_ratio", real, real)[0] == METRICS["confident_ratio"].floor == 1


def test_what_does_not_depend_on_n_is_the_same_of_a_set_taken_twice() -> None:
    fake = images(60, seed=1, sure=0.8)
    fake = replace(fake, labels=fake.labels.roll(1))
    twice = Fake(*(torch.cat([x, x]) for x in (fake.features, fake.probabilities, fake.labels)))
    for name, metric in METRICS.items():
        if not metric.depends_on_n:
            assert measure(name, SPLIT, twice)[0] == pytest.approx(measure(name, SPLIT, fake)[0])


def test_a_score_is_json() -> None:
    assert Score(1.0).to_json() == {"value": 1.0, "error": None, "floor": None}
    assert list(Score(1.0, 0.5, 2.0).to_json().items()) == [("value", 1.0), ("error", 0.5), ("floor", 2.0)]


def test_a_part_of_a_set() -> None:
    part = fake_of([[0.0], [1.0], [2.0]], labels=[3, 4, 5]).part(1, 3)
    assert (part.n, part.features.tolist(), part.labels.tolist()) == (2, [[1.0], [2.0]], [4, 5])
