import itertools

import pytest
import torch

from stages.diffusion import noise
from stages.diffusion.samplers import SAMPLERS, clipped_denoiser, ddim, ddpm, spaced_timesteps
from stages.diffusion.schedules import SCHEDULES

N = 8_000


def table(name="cosine", T=100):
    return torch.from_numpy(SCHEDULES[name](T))


def draw(sampler, denoise, alpha_bar, timesteps, shape=(4, 1, 3, 3), seed=0, **options):
    index = torch.arange(shape[0])

    def noise_at(t):
        return noise.gaussian(seed, index, t, shape[1:]).double()

    *_, (_, x, _) = SAMPLERS[sampler](denoise, noise_at(len(alpha_bar)), alpha_bar, timesteps, noise_at, **options)
    return x


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_exact_denoiser_of_a_point_mass_lands_on_it(sampler, schedule, steps):
    point = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(1, 3, 3)
    x = draw(sampler, lambda x, a: point.expand_as(x), table(schedule), spaced_timesteps(100, steps))
    torch.testing.assert_close(x, point.expand_as(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("sampler", "options"), [("ddpm", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 1.0})])
def test_exact_denoiser_of_a_gaussian_gives_its_mean_and_variance(sampler, options):
    """For x0 ~ N(m, s^2), E[x0 | x_t] is linear in x_t, and a full chain ends near N(m, s^2).

    Tolerances: N draws know the mean to s / sqrt(N) = 0.0067 and the standard deviation to 0.0047 (three of them allowed);
    the discretisation of 200 steps adds less than 0.01 to each.
    """
    m, s = 0.3, 0.6
    alpha_bar = table(T=200)

    def denoise(x, a):
        return m + a.sqrt() * s**2 / (a * s**2 + 1 - a) * (x - a.sqrt() * m)

    x = draw(sampler, denoise, alpha_bar, spaced_timesteps(200, 200), shape=(N, 1, 1, 1), **options)
    assert x.mean().item() == pytest.approx(m, abs=0.03)
    assert x.std().item() == pytest.approx(s, abs=0.024)
    # Known-bad: a chain started at half the noise does not end there.
    wrong = draw(sampler, lambda x, a: denoise(x * 0.5, a), alpha_bar, spaced_timesteps(200, 200), shape=(N, 1, 1, 1), **options)
    assert wrong.std().item() != pytest.approx(s, abs=0.024)


def test_ddim_with_eta_1_equals_ddpm_step_by_step():
    alpha_bar, steps = table("linear"), spaced_timesteps(100, 20)
    x_T = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def denoise(x, a):
        return (0.8 * x).clamp(-1, 1)

    def noise_at(t):
        return torch.full_like(x_T, 0.1 * t)

    chains = (sampler(denoise, x_T, alpha_bar, steps, noise_at, eta=1.0) for sampler in (ddpm, ddim))
    for (t, x_ddpm, _), (_, x_ddim, _) in zip(*chains, strict=True):
        torch.testing.assert_close(x_ddpm, x_ddim, rtol=0, atol=1e-9, msg=f"t = {t}")


@pytest.mark.parametrize(("T", "steps"), [(1000, 25), (200, 25), (10, 10), (10, 7), (7, 1), (50, 49)])
def test_spaced_timesteps_fall_from_the_last_one(T, steps):
    spaced = spaced_timesteps(T, steps)
    assert spaced[0] == T - 1
    assert len(spaced) == steps
    assert all(a > b for a, b in itertools.pairwise(spaced))
    assert spaced[-1] >= 0
    gaps = [a - b for a, b in itertools.pairwise(spaced)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("steps", [0, 11])
def test_more_steps_than_T_or_none_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps = {steps} must lie in 1..10"):
        spaced_timesteps(10, steps)


def test_guidance_0_is_exactly_the_conditional_model_in_one_evaluation():
    calls = []

    def net(x, logsnr, y):
        calls.append(y.tolist())
        return 0.1 * y.reshape(-1, 1, 1, 1).to(x) * torch.ones_like(x)

    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([1, 2])
    a = torch.tensor(0.5, dtype=torch.float64)
    plain = clipped_denoiser(net, "x0", y, unlabelled=3, guidance=0)(x, a)
    torch.testing.assert_close(plain[:, 0, 0, 0], torch.tensor([0.1, 0.2]))
    guided = clipped_denoiser(net, "x0", y, unlabelled=3, guidance=0.5)(x, a)
    torch.testing.assert_close(guided[:, 0, 0, 0], torch.tensor([0.1 + 0.5 * (0.1 - 0.3), 0.2 + 0.5 * (0.2 - 0.3)]))
    assert calls == [[1, 2], [1, 2, 3, 3]]


def test_guidance_acts_inside_its_interval_alone():
    calls = []

    def net(x, logsnr, y):
        calls.append(len(x))
        return torch.zeros_like(x)

    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([1, 2])
    denoise = clipped_denoiser(net, "x0", y, unlabelled=3, guidance=0.5, guidance_interval=(-4, 2))
    for level in (-4.1, -3.9, 1.9, 2.1):
        denoise(x, torch.sigmoid(torch.tensor(level, dtype=torch.float64)))
    assert calls == [2, 4, 4, 2]


def test_x0_hat_is_clipped():
    denoise = clipped_denoiser(lambda x, logsnr, y: 5 * torch.ones_like(x), "x0", torch.tensor([0]), unlabelled=1, guidance=0)
    assert denoise(torch.zeros(1, 1, 2, 2), torch.tensor(0.5).double()).max() == 1
