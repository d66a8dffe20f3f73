import pytest
import torch

from stages.diffusion.guidance import denoiser


def test_guidance_0_is_exactly_the_conditional_model_in_one_evaluation():
    calls = []

    def net(x, logsnr, y):
        calls.append(y.tolist())
        return 0.1 * y.reshape(-1, 1, 1, 1).to(x) * torch.ones_like(x)

    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([1, 2])
    a = torch.tensor(0.5, dtype=torch.float64)
    plain = denoiser(net, "x0", y, unlabelled=3)(x, a)
    torch.testing.assert_close(plain[:, 0, 0, 0], torch.tensor([0.1, 0.2]))
    guided = denoiser(net, "x0", y, unlabelled=3, guidance=0.5)(x, a)
    torch.testing.assert_close(guided[:, 0, 0, 0], torch.tensor([0.1 + 0.5 * (0.1 - 0.3), 0.2 + 0.5 * (0.2 - 0.3)]))
    assert calls == [[1, 2], [1, 2, 3, 3]]


def test_guidance_acts_inside_its_interval_alone():
    calls = []

    def net(x, logsnr, y):
        calls.append(len(x))
        return torch.zeros_like(x)

    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([1, 2])
    denoise = denoiser(net, "x0", y, unlabelled=3, guidance=0.5, guidance_interval=(-4, 2))
    for level in (-4.1, -3.9, 1.9, 2.1):
        denoise(x, torch.sigmoid(torch.tensor(level, dtype=torch.float64)))
    assert calls == [2, 4, 4, 2]


@pytest.mark.parametrize(("clip", "expected"), [(True, 1), (False, 5)])
def test_x0_hat_is_clipped_or_not(clip, expected):
    denoise = denoiser(lambda x, logsnr, y: 5 * torch.ones_like(x), "x0", torch.tensor([0]), unlabelled=1, clip=clip)
    assert denoise(torch.zeros(1, 1, 2, 2), torch.tensor(0.5).double()).max() == expected
