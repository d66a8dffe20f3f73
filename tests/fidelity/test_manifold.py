import pytest
import torch

from stages.fidelity.manifold import precision_recall


def cloud(n, seed, scale=1.0, shift=0.0):
    return scale * torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)) + shift


def by_hand(real, fake, k=3):
    """The definition, one point at a time."""

    def inside(points, centres):
        radii = [sorted((a - b).norm().item() for b in centres)[k] for a in centres]  # the first is itself
        return sum(any((p - c).norm().item() <= r for c, r in zip(centres, radii, strict=True)) for p in points) / len(points)

    return inside(fake, real), inside(real, fake)


def test_it_is_the_definition():
    real, fake = cloud(60, 0), cloud(50, 1, scale=0.9, shift=0.3)
    (precision, _), (recall, _) = precision_recall(real, fake)
    assert (precision, recall) == pytest.approx(by_hand(real, fake))
    assert (recall, precision) != pytest.approx(by_hand(real, fake))  # the wrong way round is another number


def test_a_narrow_set_is_precise_and_a_wide_one_recalls():
    real = cloud(1500, 0)
    (precision, error), (recall, _) = precision_recall(real, cloud(1500, 1, scale=0.5))
    assert precision > 0.95
    assert recall < 0.5
    assert error == pytest.approx((precision * (1 - precision) / 1500) ** 0.5)
    (precision, _), (recall, _) = precision_recall(real, cloud(1500, 1, scale=2))
    assert precision < 0.5
    assert recall > 0.95


def test_a_set_is_wholly_inside_itself_and_far_from_another():
    real = cloud(200, 0)
    assert [share for share, _ in precision_recall(real, real)] == [1, 1]
    assert [share for share, _ in precision_recall(real, cloud(200, 1, shift=50))] == [0, 0]


def test_too_few_features_are_refused():
    with pytest.raises(ValueError, match="more than 3 features on both sides, not 200 and 3"):
        precision_recall(cloud(200, 0), cloud(3, 1))
