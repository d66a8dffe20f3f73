import inspect
import itertools
import math
import sys

import numpy as np
import pytest
import torch

from stages.diffusion import by_name, samplers, schedules
from stages.diffusion.brownian import Brownian
from stages.diffusion.samplers import find, names
from stages.diffusion.schedules import noise_levels
from stages.diffusion.spacings import SPACINGS, spaced

N = 8_000
M, S = 0.3, 0.6  # mean and standard deviation of the Gaussian x0 whose denoiser is known


def table(name="cosine", T=100):
    return torch.from_numpy(schedules.find(name)(T))


def gaussian_denoiser(x, a):
    """E[x0 | x_t] of x0 ~ N(M, S^2): linear in x_t."""
    return M + a.sqrt() * S**2 / (a * S**2 + 1 - a) * (x - a.sqrt() * M)


def draw(sampler, denoise, path, shape=(4, 1, 3, 3), seed=0, **options):
    noise = Brownian(seed, torch.arange(shape[0]), shape[1:], path)
    *_, (x, _) = find(sampler)(denoise, path, lambda *step: noise(*step).double(), **options)
    return x


def noise_of(x_T, then):
    """The noise of a chain that starts at x_T; `then` says that of a step between two levels."""
    return lambda a, a_next: x_T if a == 0 else then(a, a_next)


@pytest.mark.parametrize("sampler", names())
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", schedules.names())
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_exact_denoiser_of_a_point_mass_lands_on_it(sampler, spacing, schedule, steps):
    point = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(1, 3, 3)
    x = draw(sampler, lambda x, a: point.expand_as(x), spaced(table(schedule), steps, spacing))
    torch.testing.assert_close(x, point.expand_as(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("sampler", "options"), [("ddim", {"eta": 1.0}), *((name, {}) for name in names())])
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
        *_, (x, _) = sampler(gaussian_denoiser, path, noise_of(x_T, lambda *_: torch.full_like(x_T, math.nan)))
        errors.append((x - exact).abs().max().item())
    return -np.median(np.diff(np.log2(errors)))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize(
    ("name", "spacing", "expected"), [("ddim", "even_logsnr", 1), ("dpm_solver_pp_2m", "even_logsnr", 2), ("heun", "karras", 2)]
)
def test_deterministic_samplers_converge_at_their_order(name, spacing, expected, schedule):
    """Over 10..160 steps, each in the spacing that it was published with."""
    assert order(find(name), spacing, schedule) == pytest.approx(expected, abs=0.25)


def test_known_bad_samplers_do_not_converge_at_their_order(monkeypatch):
    def broken(name, good, bad):
        source = inspect.getsource(samplers.look_ahead) + inspect.getsource(find(name))
        assert good in source
        scope = vars(samplers) | vars(sys.modules[find(name).__module__])
        exec(source.replace(good, bad), scope)
        return scope["sample"]

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

    noise = noise_of(x_T, lambda a, a_next: torch.full_like(x_T, float(a + 3 * a_next)))
    chains = find("ddpm")(denoise, path, noise), find("ddim")(denoise, path, noise, eta=1.0)
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
    *_, (ours, _) = find("heun")(gaussian_denoiser, path, lambda *_: x)
    # sigma starts at 4,000: rounding of 2e-16 there is 1e-12 here.
    torch.testing.assert_close(ours, ve, rtol=0, atol=1e-10)


def test_a_sampler_is_a_file_found_by_its_name(tmp_path, monkeypatch):
    assert {"ddpm", "ddim", "dpm_solver_pp_2m", "sde_dpm_solver_pp_2m", "heun"} <= set(names())
    monkeypatch.setattr(by_name, "HERE", tmp_path)
    (tmp_path / "samplers").mkdir()
    (tmp_path / "samplers/euler.py").touch()
    with pytest.raises(ValueError, match=r"there is no stages/diffusion/samplers/ddim.py; allowed: euler$"):
        find("ddim")


def test_evaluations_of_a_step():
    for name, expected in {"ddpm": 10, "ddim": 10, "dpm_solver_pp_2m": 10, "sde_dpm_solver_pp_2m": 10, "heun": 19}.items():
        calls = []
        draw(name, lambda x, a, calls=calls: calls.append(a) or gaussian_denoiser(x, a), spaced(table(), 10, "trailing"))
        assert len(calls) == expected, name


@pytest.mark.parametrize(
    ("name", "options", "stochastic"),
    [
        ("ddpm", {"variance": "posterior"}, True),
        ("ddpm", {"variance": "beta"}, True),
        ("ddim", {"eta": 0.0}, False),
        ("ddim", {"eta": 0.5}, True),
        ("ddim", {"eta": 1.0}, True),
        ("dpm_solver_pp_2m", {}, False),
        ("sde_dpm_solver_pp_2m", {}, True),
        ("heun", {}, False),
    ],
)
def test_noise_is_asked_for_between_the_levels_of_each_step(name, options, stochastic):
    asked = []
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    path = spaced(table(), 10, "trailing")
    list(find(name)(gaussian_denoiser, path, lambda *step: asked.append(tuple(map(float, step))) or x, **options))
    levels = [0.0, *path.tolist()[:-1]]  # the last step, to an image, has no noise
    assert asked == (list(itertools.pairwise(levels)) if stochastic else [(0.0, 0.0)])


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_variance_of_an_ancestral_step(variance):
    a, a_next = torch.tensor([0.3, 0.5], dtype=torch.float64)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    ((quiet, _),) = find("ddpm")(gaussian_denoiser, torch.stack([a, a_next]), lambda *_: x, variance=variance)
    ((loud, _),) = find("ddpm")(gaussian_denoiser, torch.stack([a, a_next]), noise_of(x, lambda *_: x + 1), variance=variance)
    beta = 1 - 0.3 / 0.5
    expected = beta if variance == "beta" else beta * (1 - 0.5) / (1 - 0.3)
    assert ((loud - quiet) ** 2).item() == pytest.approx(expected, rel=1e-12)


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


@pytest.mark.parametrize("sampler", [name for name in names() if name != "heun"])
def test_a_chain_may_start_without_any_signal(sampler):
    alpha_bar = torch.from_numpy(noise_levels("cosine", 100, size=28, reference_size=None, zero_terminal_snr=True))
    x = draw(sampler, gaussian_denoiser, spaced(alpha_bar, 100, "trailing"), shape=(N, 1, 1, 1))
    assert x.mean().item() == pytest.approx(M, abs=0.03)
    assert x.std().item() == pytest.approx(S, abs=0.03)


def test_what_cannot_start_without_any_signal_says_so_and_shifted_cosine_can():
    alpha_bar = torch.from_numpy(noise_levels("cosine", 100, size=28, reference_size=None, zero_terminal_snr=True))
    x = torch.zeros(1, 1, 2, 2).double()
    with pytest.raises(ValueError, match="'heun' cannot start at a zero SNR"):
        next(find("heun")(gaussian_denoiser, spaced(alpha_bar, 10, "trailing"), lambda *_: x))
    for spacing in ("even_logsnr", "karras"):
        with pytest.raises(ValueError, match="use 'trailing'"):
            spaced(alpha_bar, 10, spacing)
    path = spaced(alpha_bar, 10, "shifted_cosine")
    assert path[0] == 0
    assert (path.diff() > 0).all()
