import pytest
import torch

from stages.networks import ema
from stages.networks.unet import UNet


def build(size=28, **options):
    torch.manual_seed(0)
    sizes = {"stem_resolution": 16, "base_channels": 8, "channel_mult": [1, 2], "blocks_per_level": 1, "attention_levels": []}
    net = UNet(size=size, num_classes=3, **{**sizes, "conditional": True, **options}).eval()
    for weights in net.parameters():  # zero-initialised layers would hide what passes through them
        torch.nn.init.normal_(weights, std=0.1)
    return net


def inputs(size, n=4):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, size, size, generator=rng), torch.linspace(-5, 5, n), torch.arange(n) % 4


@pytest.mark.parametrize("size", [16, 28, 30, 33, 64])
@pytest.mark.parametrize(
    "options", [{}, {"channel_mult": [1, 2, 2], "blocks_per_level": 2}, {"attention_levels": [1]}, {"channel_mult": [1]}]
)
def test_output_is_shaped_like_the_input_at_any_size(size, options):
    x, logsnr, y = inputs(size)
    assert build(size, **options)(x, logsnr, y).shape == x.shape


def test_an_untrained_network_predicts_zero():
    net = UNet(
        size=28, num_classes=3, stem_resolution=16, base_channels=8, channel_mult=[1], blocks_per_level=1, attention_levels=[],
        conditional=True,
    )  # fmt: skip
    assert net(*inputs(28)).abs().max() == 0


def test_label_and_noise_level_matter():
    net, (x, logsnr, y) = build(), inputs(28)
    assert not torch.allclose(net(x, logsnr, y), net(x, logsnr, (y + 1) % 4))
    assert not torch.allclose(net(x, logsnr, y), net(x, logsnr + 1, y))


def test_unconditional_ignores_the_label():
    net, (x, logsnr, y) = build(conditional=False), inputs(28)
    torch.testing.assert_close(net(x, logsnr, y), net(x, logsnr, (y + 1) % 4), rtol=0, atol=0)


def test_attention_reaches_across_the_image():
    """A change in one corner reaches the far corner through attention; through one 3x3 block on 16x16 it cannot."""
    x, logsnr, y = inputs(16, n=1)
    changed = x.clone()
    changed[..., 0, 0] += 1
    for levels, reaches in ([], False), ([0], True):
        net = build(16, channel_mult=[1], attention_levels=levels)
        net.middle = torch.nn.Identity()
        net.middle.forward = lambda h, emb: h
        for block in [*net.down, *net.up]:
            block.norm1 = block.norm2 = torch.nn.Identity()  # group norm sees the whole image
        net.norm = torch.nn.Identity()
        difference = (net(changed, logsnr, y) - net(x, logsnr, y))[..., -1, -1].abs().item()
        assert (difference > 0) == reaches


def test_average_of_constant_weights_is_the_constant_and_it_forgets_its_start():
    average, current = [torch.full((3,), 100.0)], [torch.ones(3)]
    for step in range(1, 101):
        ema.update(average, current, torch.tensor(ema.weight(step, 0.05)))
    torch.testing.assert_close(average[0], current[0])


def test_halflife_is_a_fraction_of_the_steps():
    """Between step n and (1 + h) n, about half of the old value is left: weights 0 before, 1 after."""
    average = [torch.zeros(1)]
    for step in range(1001, 1051):
        ema.update(average, [torch.ones(1)], torch.tensor(ema.weight(step, 0.05)))
    # The half-life grows from 50.05 to 52.5 steps meanwhile, so 50 steps leave 2^(-50/52.5) to 2^(-50/50.05) of the start.
    assert 0.48 <= average[0].item() <= 0.5


@pytest.mark.skipif(torch.get_num_threads() == 1, reason="one thread adds up in one order")
def test_gradients_of_a_whole_batch_are_the_same_bits_every_time():
    """Some kernels add up in the order in which their threads come, once there is enough to add up to be worth threads."""
    net = build(28, base_channels=32, attention_levels=[1])
    x, logsnr, y = inputs(28, n=64)
    first = torch.autograd.grad(net(x, logsnr, y).square().mean(), list(net.parameters()))
    for _ in range(10):
        again = torch.autograd.grad(net(x, logsnr, y).square().mean(), list(net.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
