import inspect
import math

import numpy as np
import pytest
import torch

from stages.diffusion import noise, samplers
from stages.diffusion.process import logsnr
from stages.diffusion.samplers import SAMPLERS, SPACINGS, ddim, ddpm, denoiser, spaced
from stages.diffusion.schedules import SCHEDULES, noise_levels

N = 8_000
M, S = 0.3, 0.6  # mean and standard deviation of the Gaussian x0 whose denoiser is known


def table(name="cosine", T=100):
    return torch.from_numpy(SCHEDULES[name](T))


def gaussian_denoiser(x, a):
    """E[x0 | x_t] of x0 ~ N(M, S^2): linear in x_t."""
    return M + a.sqrt() * S**2 / (a * S**2 + 1 - a) * (x - a.sqrt() * M)


def draw(sampler, denoise, path, shape=(4, 1, 3, 3), seed=0, **options):
    index = torch.arange(shape[0])

    def noise_at(after):
        return noise.gaussian(seed, index, after, shape[1:]).double()

    *_, (x, _) = SAMPLERS[sampler](denoise, noise_at(len(path) + 1), path, noise_at, **options)
    return x


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_exact_denoiser_of_a_point_mass_lands_on_it(sampler, spacing, schedule, steps):
    point = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(1, 3, 3)
    x = draw(sampler, lambda x, a: point.expand_as(x), spaced(table(schedule), steps, spacing))
    torch.testing.assert_close(x, point.expand_as(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("sampler", "options"), [("ddim", {"eta": 1.0}), *((name, {}) for name in SAMPLERS)])
def test_exact_denoiser_of_a_gaussian_gives_its_mean_and_variance(sampler, options):
    """A full chain ends near N(M, S^2).

    Tolerances: N draws know the mean to S / sqrt(N) = 0.0067 and the standard deviation to 0.0047 (three of them allowed);
    the discretisation of 200 steps adds less than 0.01 to each.
    """
    path = spaced(table(T=200), 200, "trailing")
    x = draw(sampler, gaussian_denoiser, path, shape=(N, 1, 1, 1), **options)
    assert x.mean().item() == pytest.approx(M, abs=0.03)
    assert x.std().item() == pytest.approx(S, abs=0.024)
    # Known-bad: a network that is told half of x does not end there.
    wrong = draw(sampler, lambda x, a: gaussian_denoiser(x * 0.5, a), path, shape=(N, 1, 1, 1), **options)
    assert wrong.std().item() != pytest.approx(S, abs=0.024)


def order(sampler, spacing="even_logsnr", schedule="cosine"):
    """Order of convergence to the known end of the probability flow of a Gaussian, from the first to the last level of a table.

    There (x - sqrt(alpha_bar) M) / sd(alpha_bar) never changes. Without the jump to no noise, which is of first order in all. The
    median over the doublings: at ten steps across thousands-fold noise an error may still change its sign.
    """
    alpha_bar = table(schedule, T=1000)
    sd = (alpha_bar * S**2 + 1 - alpha_bar).sqrt()
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    exact = alpha_bar[0].sqrt() * M + sd[0] / sd[-1] * (x_T - alpha_bar[-1].sqrt() * M)
    steps, errors = [10, 20, 40, 80, 160], []
    for count in steps:
        path = SPACINGS[spacing](alpha_bar, count + 1)
        *_, (x, _) = sampler(gaussian_denoiser, x_T, path, lambda after: torch.full_like(x_T, math.nan))
        errors.append((x - exact).abs().max().item())
    return -np.median(np.diff(np.log2(errors)))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize(
    ("name", "spacing", "expected"), [("ddim", "even_logsnr", 1), ("dpm_solver_pp_2m", "even_logsnr", 2), ("heun", "karras", 2)]
)
def test_deterministic_samplers_converge_at_their_order(name, spacing, expected, schedule):
    """Over 10..160 steps, each in the spacing that it was published with."""
    assert order(SAMPLERS[name], spacing, schedule) == pytest.approx(expected, abs=0.25)


def test_known_bad_samplers_do_not_converge_at_their_order(monkeypatch):
    def broken(name, good, bad):
        source = inspect.getsource(samplers._ahead) + inspect.getsource(SAMPLERS[name])
        assert good in source
        scope = dict(vars(samplers))
        exec(source.replace(good, bad), scope)
        return scope[name]

    whole_step = broken("dpm_solver_pp_2m", "h / (2 * h_before)", "h / h_before")
    assert order(whole_step) < 1.6
    unhalved = broken("heun", "/ 2 * change", "* change")
    assert order(unhalved) < 1.6
    rootless = broken("ddim", "(1 - a_next - sigma2).sqrt()", "(1 - a_next - sigma2)")
    assert order(rootless) < 0.6


def test_second_order_ancestral_sampling_is_closer_in_few_steps():
    """Wide first-order steps lose spread; by the linear denoiser of a Gaussian its loss can be read off the noise-free map."""

    def lost(sampler, steps):
        x = draw(sampler, gaussian_denoiser, spaced(table(T=1000), steps, "trailing"), shape=(20 * N, 1, 1, 1))
        return abs(x.std().item() - S)

    for steps in (8, 16):
        assert lost("sde_dpm_solver_pp_2m", steps) < 0.5 * lost("ddpm", steps), steps


def test_ddim_with_eta_1_equals_ddpm_step_by_step():
    path = spaced(table("linear"), 20, "trailing")
    x_T = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def denoise(x, a):
        return (0.8 * x).clamp(-1, 1)

    def noise_at(after):
        return torch.full_like(x_T, 0.1 * after)

    chains = ddpm(denoise, x_T, path, noise_at), ddim(denoise, x_T, path, noise_at, eta=1.0)
    for k, ((x_ddpm, _), (x_ddim, _)) in enumerate(zip(*chains, strict=True)):
        torch.testing.assert_close(x_ddpm, x_ddim, rtol=0, atol=1e-9, msg=f"step {k}")


def test_heun_is_the_published_algorithm_in_sigma():
    """EDM's algorithm 1 without churn, written as it is printed: x + noise of standard deviation sigma, no scaling."""
    path = spaced(table(), 12, "karras")
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = ((1 - path) / path).sqrt().tolist()
    ve = x / path[0].sqrt()
    for i in range(12):
        slope = (ve - gaussian_denoiser(ve * path[i].sqrt(), path[i])) / sigma[i]
        ahead = ve + (sigma[i + 1] - sigma[i]) * slope
        if sigma[i + 1] > 0:
            slope_there = (ahead - gaussian_denoiser(ahead * path[i + 1].sqrt(), path[i + 1])) / sigma[i + 1]
            ahead = ve + (sigma[i + 1] - sigma[i]) * (slope + slope_there) / 2
        ve = ahead
    *_, (ours, _) = samplers.heun(gaussian_denoiser, x, path, lambda after: x)
    # sigma starts at 4,000: rounding of 2e-16 there is 1e-12 here.
    torch.testing.assert_close(ours, ve, rtol=0, atol=1e-10)


def test_evaluations_of_a_step():
    for name, expected in {"ddpm": 10, "ddim": 10, "dpm_solver_pp_2m": 10, "sde_dpm_solver_pp_2m": 10, "heun": 19}.items():
        calls = []
        draw(name, lambda x, a, calls=calls: calls.append(a) or gaussian_denoiser(x, a), spaced(table(), 10, "trailing"))
        assert len(calls) == expected, name


def test_noise_is_asked_for_by_how_many_steps_follow():
    asked = []
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    path = spaced(table(), 100, "trailing")
    list(ddpm(gaussian_denoiser, x, path, lambda after: asked.append(after) or x))
    assert asked == list(range(99, 0, -1))  # t of a full chain; the last step has no noise


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_variance_of_an_ancestral_step(variance):
    a, a_next = torch.tensor([0.3, 0.5], dtype=torch.float64)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    ((quiet, _),) = ddpm(gaussian_denoiser, x, torch.stack([a, a_next]), lambda after: x, variance=variance)
    ((loud, _),) = ddpm(gaussian_denoiser, x, torch.stack([a, a_next]), lambda after: x + 1, variance=variance)
    beta = 1 - 0.3 / 0.5
    expected = beta if variance == "beta" else beta * (1 - 0.5) / (1 - 0.3)
    assert ((loud - quiet) ** 2).item() == pytest.approx(expected, rel=1e-12)


# The levels of each spacing: T, steps -> indices.
@pytest.mark.parametrize(
    ("spacing", "T", "steps", "indices"),
    [
        ("trailing", 10, 4, [9, 7, 4, 2]),
        ("trailing", 1000, 4, [999, 749, 499, 249]),
        ("trailing", 7, 1, [6]),
        ("leading", 10, 4, [6, 4, 2, 0]),
        ("leading", 1000, 4, [750, 500, 250, 0]),
        ("linspace", 10, 4, [9, 6, 3, 0]),
        ("linspace", 7, 1, [6]),
    ],
)
def test_spacings_in_t(spacing, T, steps, indices):
    alpha_bar = table("cosine", T)
    assert spaced(alpha_bar, steps, spacing).tolist() == [*alpha_bar[indices].tolist(), 1.0]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("T", "steps"), [(1000, 25), (200, 25), (10, 10), (10, 7), (7, 1), (50, 49)])
def test_every_spacing_rises_to_1_inside_the_table(spacing, T, steps):
    alpha_bar = table("cosine", T)
    path = spaced(alpha_bar, steps, spacing)
    assert path.shape == (steps + 1,)
    assert path.dtype == torch.float64
    assert (path.diff() > 0).all()
    assert path[-1] == 1
    assert alpha_bar[-1] * (1 - 1e-9) <= path[0]
    assert path[-2] <= alpha_bar[0] * (1 + 1e-9)
    if spacing != "leading":
        assert path[0].item() == pytest.approx(alpha_bar[-1].item(), rel=1e-9)


def test_spacings_between_the_levels_are_even_in_what_they_say():
    path = spaced(table(), 9, "even_logsnr")[:-1]
    np.testing.assert_allclose(logsnr(path).diff(), logsnr(path).diff()[0], rtol=1e-9)
    root = ((1 / spaced(table(), 9, "karras")[:-1] - 1) ** 0.5) ** (1 / 7)
    np.testing.assert_allclose(root.diff(), root.diff()[0], rtol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -1.7])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_shifted_cosine_is_about_the_same_on_every_schedule_and_for_every_size_of_the_images(schedule, shift):
    """A cosine schedule without ends has a log-SNR of -2 log tan(pi t / 2 T)."""
    path = spaced(torch.sigmoid(logsnr(table(schedule)) + shift), 12, "shifted_cosine")
    expected = -2 - 2 * np.log(np.tan(np.pi / 2 * (1 - np.arange(3, 11) / 12)))
    np.testing.assert_allclose(logsnr(path)[3:11], expected, atol=0.2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_twelve_steps_keep_the_spread_of_what_varies_most(schedule):
    """Along the first principal component of the digits of a class x0 has a standard deviation of about 5."""

    def spread(sd, spacing):
        path = spaced(table(schedule, T=1000), 12, spacing)
        x = draw("sde_dpm_solver_pp_2m", lambda x, a: a.sqrt() * sd**2 / (a * sd**2 + 1 - a) * x, path, shape=(N, 1, 2, 2))
        return x.std().item() / sd

    for sd in (1.0, 3.0, 5.0):
        assert spread(sd, "shifted_cosine") == pytest.approx(1, abs=0.05)
    if schedule == "cosine":
        assert spread(5.0, "trailing") < 0.9


@pytest.mark.parametrize("steps", [0, 11])
def test_more_steps_than_T_or_none_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps = {steps} must lie in 1..10"):
        spaced(table(T=10), steps, "trailing")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver_pp_2m", "sde_dpm_solver_pp_2m"])
def test_a_chain_may_start_without_any_signal(sampler):
    alpha_bar = torch.from_numpy(noise_levels("cosine", 100, size=28, reference_size=None, zero_terminal_snr=True))
    x = draw(sampler, gaussian_denoiser, spaced(alpha_bar, 100, "trailing"), shape=(N, 1, 1, 1))
    assert x.mean().item() == pytest.approx(M, abs=0.03)
    assert x.std().item() == pytest.approx(S, abs=0.03)


def test_what_cannot_start_without_any_signal_says_so_and_shifted_cosine_can():
    alpha_bar = torch.from_numpy(noise_levels("cosine", 100, size=28, reference_size=None, zero_terminal_snr=True))
    x = torch.zeros(1, 1, 2, 2).double()
    with pytest.raises(ValueError, match="'heun' cannot start at a zero SNR"):
        next(samplers.heun(gaussian_denoiser, x, spaced(alpha_bar, 10, "trailing"), lambda after: x))
    for spacing in ("even_logsnr", "karras"):
        with pytest.raises(ValueError, match="use 'trailing'"):
            spaced(alpha_bar, 10, spacing)
    path = spaced(alpha_bar, 10, "shifted_cosine")
    assert path[0] == 0
    assert (path.diff() > 0).all()


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
