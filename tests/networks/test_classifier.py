import pytest
import torch
import torch.nn.functional as F

from stages.networks.classifier import CHUNK, FEATURES, Classifier, classify, shift


def untrained(size: int = 28, num_classes: int = 10) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(size, num_classes).to(memory_format=torch.channels_last).eval()


def images(n: int, size: int = 28, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", [16, 28, 33, 64, 100])
def test_shapes_at_every_size(size: int) -> None:
    net = untrained(size, 7)
    x = images(3, size)
    assert net.features(x).shape == (3, FEATURES)
    assert net.features(x).dtype == torch.float32
    assert torch.equal(net(x), net.logits(net.features(x)))
    assert net(x).shape == (3, 7)


def test_every_size_costs_about_the_same() -> None:
    def parameters(size: int) -> int:
        return sum(p.numel() for p in untrained(size).parameters())

    assert parameters(128) < 2 * parameters(32)


def test_an_image_depends_on_no_companion() -> None:
    net, x = untrained(), images(20)
    features, probabilities = classify(net, [x])
    alone, alone_probabilities = classify(net, [x[7:8]])
    assert torch.equal(features[7], alone[0])
    assert torch.equal(probabilities[7], alone_probabilities[0])
    net.train()  # batch norm mixes the batch now: the same comparison notices
    assert not torch.equal(classify(net, [x])[0][7], classify(net, [x[7:8]])[0][0])


def test_classify_keeps_order_and_count_over_chunks() -> None:
    net, x = untrained(), images(CHUNK + 5)
    features, probabilities = classify(net, x.split(CHUNK))
    assert features.shape == (CHUNK + 5, FEATURES)
    assert probabilities.dtype == torch.float64
    # float64 softmax of 10 classes sums to 1 within a few roundings
    assert probabilities.sum(1).sub(1).abs().max() < 1e-14
    assert torch.equal(features[CHUNK:], classify(net, [x[CHUNK:]])[0])
    with torch.inference_mode():
        assert probabilities.argmax(1).equal(net(x).argmax(1))


def test_shift_moves_whole_images_and_repeats_the_edge() -> None:
    x = images(50, 8)
    moved = shift(x, 2, torch.Generator().manual_seed(0))
    # Every result is one of the 25 crops of the edge-padded image.
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    crops = [padded[:, :, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    hits = torch.stack([(moved == crop).all(dim=(1, 2, 3)) for crop in crops])  # (25, B)
    assert hits.any(0).all()
    assert hits.any(1).sum() > 15  # 50 images reach most of the 25 offsets: 22 expected, sd below 2
    assert torch.equal(moved, shift(x, 2, torch.Generator().manual_seed(0)))
    assert torch.equal(x, shift(x, 0, torch.Generator()))
