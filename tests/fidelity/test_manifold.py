import pytest
import torch
from made_up import fake_of, real_of

from stages.fidelity import manifold
from stages.fidelity.precision import precision
from stages.fidelity.recall import recall


def cloud(n, seed, scale=1.0, shift=0.0):
    return scale * torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)) + shift


def both(real, fake):
    sets = real_of(fake_of(real)), fake_of(fake)
    return precision(*sets), recall(*sets)


def by_hand(real, fake, k=3):
    """The definition, one point at a time."""

    def inside(points, centres):
        radii = [sorted((a - b).norm().item() for b in centres)[k] for a in centres]  # the first is itself
        return sum(any((p - c).norm().item() <= r for c, r in zip(centres, radii, strict=True)) for p in points) / len(points)

    return inside(fake, real), inside(real, fake)


def test_four_images_by_hand():
    # The fewest that have a third nearest other one. Radii of 0, 1, 2, 3 are 3, 2, 2, 3: their balls fill [-3, 6]; 5 and 6 are in.
    # Radii of -20, 5, 6, 7 are 27, 25, 26, 27: every ball holds 0..3.
    (of_samples, error), (of_real, no_error) = both([[0.0], [1.0], [2.0], [3.0]], [[-20.0], [5.0], [6.0], [7.0]])
    assert (of_samples, of_real) == (0.5, 1)
    assert (error, no_error) == (0.25, 0)


def test_it_is_the_definition():
    real, fake = cloud(60, 0), cloud(60, 1, scale=0.9, shift=0.3)
    (of_samples, _), (of_real, _) = both(real, fake)
    assert (of_samples, of_real) == pytest.approx(by_hand(real, fake))
    assert (of_real, of_samples) != pytest.approx(by_hand(real, fake))  # the wrong way round is another number


def test_sets_need_not_be_of_one_size_nor_fit_a_chunk(monkeypatch):
    monkeypatch.setattr(manifold, "CHUNK", 7)
    real, fake = cloud(60, 0), cloud(50, 1, scale=0.9, shift=0.3)
    shares = [x.double().mean() for x in manifold.coverage(real, manifold.radii(real), fake, manifold.radii(fake))]
    assert shares == pytest.approx(by_hand(real, fake))


def test_a_narrow_set_is_precise_and_a_wide_one_recalls():
    real = cloud(1500, 0)
    (of_samples, error), (of_real, _) = both(real, cloud(1500, 1, scale=0.5))
    assert of_samples > 0.95
    assert of_real < 0.5
    assert error == pytest.approx((of_samples * (1 - of_samples) / 1500) ** 0.5)
    (of_samples, _), (of_real, _) = both(real, cloud(1500, 1, scale=2))
    assert of_samples < 0.5
    assert of_real > 0.95


def test_a_set_is_wholly_inside_itself_and_far_from_another():
    real = cloud(200, 0)
    assert [share for share, _ in both(real, real)] == [1, 1]
    assert [share for share, _ in both(real, cloud(200, 1, shift=50))] == [0, 0]


def test_a_set_is_compared_with_as_many_real_images():
    real, fake = cloud(200, 0), cloud(50, 1, scale=0.8)
    assert both(real, fake) == both(real[:50], fake)
    assert both(real, fake) != both(real[50:], fake)


def test_distances_of_a_set_are_computed_once(monkeypatch):
    asked = []
    distances = manifold._distances
    monkeypatch.setattr(manifold, "_distances", lambda a, b: asked.append((len(a), len(b))) or distances(a, b))
    real = real_of(fake_of(cloud(200, 0)))
    for seed in (1, 2):
        fake = fake_of(cloud(50, seed, scale=0.5))
        assert precision(real, fake) != recall(real, fake)
    assert len(asked) == 1 + 2 * 2  # the real radii, and for each set its own and those between


def test_too_few_features_are_refused():
    with pytest.raises(ValueError, match="more than 3 features on both sides, not 3 and 3"):
        both(cloud(200, 0), cloud(3, 1))
    with pytest.raises(ValueError, match="more than 3 features on both sides, not 3 and 200"):
        both(cloud(3, 0), cloud(200, 1))
