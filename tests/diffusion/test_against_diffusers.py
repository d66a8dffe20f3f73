"""Tables, single steps and full chains against the schedulers of diffusers, which is a dev dependency: without it, this fails.

Its tables are float32. Given our betas it reproduces our tables to what float32 holds; given our float64 tables themselves, its
steps are ours to rounding. benchmarks/agreement.py writes the largest differences to a table.
"""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

from stages.diffusion import samplers, schedules
from stages.diffusion.guidance import denoiser
from stages.diffusion.process import logsnr
from stages.diffusion.schedules import without_signal_at_the_end
from stages.diffusion.spacings import spaced

T = 200
SCHEDULES = schedules.names()
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
# Our sampler and its options; theirs, its options, and those of its step.
PAIRS = {
    "DDPM, posterior variance": ("ddpm", {"variance": "posterior"}, "DDPMScheduler", {"variance_type": "fixed_small"}, {}),
    "DDPM, beta variance": ("ddpm", {"variance": "beta"}, "DDPMScheduler", {"variance_type": "fixed_large"}, {}),
    "DDIM, eta 0": ("ddim", {"eta": 0.0}, "DDIMScheduler", {}, {"eta": 0.0, "use_clipped_model_output": True}),
    "DDIM, eta 0.7": ("ddim", {"eta": 0.7}, "DDIMScheduler", {}, {"eta": 0.7, "use_clipped_model_output": True}),
    "DPM-Solver++ (2M)": ("dpm_solver_pp_2m", {}, "DPMSolverMultistepScheduler", {}, {}),
    "DPM-Solver++ (2M) of the SDE": ("sde_dpm_solver_pp_2m", {}, "DPMSolverMultistepScheduler", SDE, {}),
}


def betas(schedule):
    alpha_bar = schedules.find(schedule)(T)
    return 1 - alpha_bar / np.array([1, *alpha_bar[:-1]])


def theirs(name, schedule, prediction, clip, spacing="leading", **options):
    """A scheduler of diffusers with our betas; DPM-Solver++ has no clipping but a thresholding that is the same at its default."""
    clipping = {"thresholding": clip} if name.startswith("DPM") else {"clip_sample": clip}
    return getattr(diffusers, name)(
        num_train_timesteps=T, trained_betas=betas(schedule), prediction_type=PREDICTIONS[prediction], timestep_spacing=spacing,
        **clipping, **options,
    )  # fmt: skip


def in_float64(scheduler, schedule):
    """Put our table in the place of its float32 one."""
    scheduler.alphas_cumprod = torch.from_numpy(schedules.find(schedule)(T))
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def network(x, level):
    """What stands for a network: smooth, bounded, different at every noise level, often beyond [-1, 1]."""
    return torch.tanh(1.3 * x + 0.1 * level) * 1.2 + 0.2 * torch.cos(0.3 * level + x)


def start(seed=0):
    return torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step_difference(pair, schedule, prediction, clip, t, *, float64=True, **changed):
    """Largest absolute difference of x_prev after one step from t, with the same noise, relative to the largest value."""
    ours, our_options, name, options, step_options = PAIRS[pair]
    scheduler = theirs(name, schedule, prediction, clip, **options)
    scheduler.set_timesteps(T)
    if float64:
        in_float64(scheduler, schedule)
    alpha_bar = torch.from_numpy(schedules.find(schedule)(T))
    path = torch.stack([alpha_bar[t], alpha_bar[t - 1] if t else torch.ones_like(alpha_bar[0])])
    x = start()
    level = logsnr(alpha_bar[t])
    rng = {} if name.startswith("DPM") else {"generator": torch.Generator().manual_seed(1)}
    their_x = scheduler.step(network(x, level), t, x, **rng, **{**step_options, **changed}).prev_sample
    denoise = denoiser(lambda x, level, y: network(x, level[0]), prediction, torch.zeros(3).long(), unlabelled=0, clip=clip)
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    ((our_x, _),) = samplers.find(ours)(denoise, path, lambda a, _: noise if a else x, **our_options)
    return ((our_x - their_x).abs().max() / our_x.abs().max().clamp_min(1)).item()


def chain_difference(pair, schedule, prediction, clip, steps, *, float64=True, spacing="trailing"):
    """The same for the end of a whole chain."""
    ours, our_options, name, options, step_options = PAIRS[pair]
    scheduler = theirs(name, schedule, prediction, clip, "trailing", **options)
    if float64:
        in_float64(scheduler, schedule)
    scheduler.set_timesteps(steps)
    alpha_bar = torch.from_numpy(schedules.find(schedule)(T))
    if name.startswith("DPM") and float64:
        levels = torch.cat([alpha_bar[scheduler.timesteps], torch.ones_like(alpha_bar[:1])])
        scheduler.sigmas = ((1 - levels) / levels).sqrt()
    x = start()
    draws = [start(seed=k) for k in range(steps)]
    # The only way in for noise of most of theirs is a generator; ours is handed what that generator would give.
    rngs = [torch.Generator().manual_seed(k) for k in range(steps)]
    their_x = x
    for k, t in enumerate(scheduler.timesteps):
        rng = {"variance_noise": draws[k]} if name.startswith("DPM") else {"generator": rngs[k]}
        output = network(their_x, logsnr(alpha_bar[t])).to(their_x.dtype)
        their_x = scheduler.step(output, t, their_x, **rng, **step_options).prev_sample
    denoise = denoiser(lambda x, level, y: network(x, level[0]), prediction, torch.zeros(3).long(), unlabelled=0, clip=clip)
    path = spaced(alpha_bar, steps, spacing)
    from_level = dict(zip(path.tolist(), draws, strict=False))
    *_, (our_x, _) = samplers.find(ours)(denoise, path, lambda a, _: from_level[float(a)] if a else x, **our_options)
    return ((our_x - their_x).abs().max() / our_x.abs().max().clamp_min(1)).item()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_from_the_same_betas(schedule):
    table = theirs("DDPMScheduler", schedule, "v", True).alphas_cumprod
    # A product of 200 float32 factors, each rounded to 6e-8; near 1 and near 0 the absolute error is what counts.
    assert np.abs(table.numpy() - schedules.find(schedule)(T)).max() < 2e-6


def test_tables_of_their_own():
    linear = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02).alphas_cumprod
    for name in ("linear", "linear_unscaled"):  # theirs is not rescaled with T: at T = 1000 it is the same
        assert np.abs(linear.numpy() - schedules.find(name)(1000)).max() < 2e-6
    cosine = torch.cumprod(1 - betas_for_alpha_bar(T, alpha_transform_type="cosine"), 0)
    assert np.abs(cosine.numpy() - schedules.find("cosine")(T)).max() < 2e-6
    # Known-bad: their "sigmoid" is another schedule of that name, whose betas follow a sigmoid.
    other = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="sigmoid").alphas_cumprod
    assert np.abs(other.numpy() - schedules.find("sigmoid")(1000)).max() > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr(schedule):
    rescaled = torch.cumprod(1 - rescale_zero_terminal_snr(torch.from_numpy(betas(schedule))), 0).numpy()
    np.testing.assert_allclose(without_signal_at_the_end(schedules.find(schedule)(T)), rescaled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pair", [name for name in PAIRS if not name.startswith("DPM")])  # whose steps are no functions of t
def test_single_steps(pair, schedule, prediction, clip):
    for t in (T - 1, T // 2, 1, 0):
        # Rounding of 2e-16 is magnified by 1 / sqrt(alpha_bar), 4e3 at the end of cosine.
        assert step_difference(pair, schedule, prediction, clip, t) < 1e-11, f"t = {t}"


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pair", PAIRS)
def test_full_chains(pair, schedule, prediction, clip):
    # Their DPM-Solver++ keeps x in float32, 6e-8, through 20 steps whatever the tables are.
    tolerance, steps = (1e-4, 20) if pair.startswith("DPM") else (1e-9, T)
    assert chain_difference(pair, schedule, prediction, clip, steps) < tolerance


def test_float32_tables_as_they_come_agree_with_clipping():
    """With their own tables, 1 - alpha_bar at t = 0 keeps three digits: chains agree to 1e-3, not to rounding."""
    for pair in PAIRS:
        assert chain_difference(pair, "cosine", "v", True, 20 if pair.startswith("DPM") else T, float64=False) < 1e-3, pair


def test_the_last_step_of_ancestral_sampling_has_no_noise_on_purpose():
    """In a chain that ends above t = 0, theirs still adds noise to the last image, by beta variance a lot; ours never does."""
    assert chain_difference("DDPM, beta variance", "linear", "v", True, 20) > 0.1
    assert chain_difference("DDPM, beta variance", "linear", "v", True, T) < 1e-9


def test_ddim_differs_on_purpose_where_x0_is_clipped():
    """By default theirs clips x0_hat and keeps the eps_hat of the unclipped one: the two no longer add up to x_t. Ours do."""
    arguments = ("DDIM, eta 0", "cosine", "eps")
    assert step_difference(*arguments, True, T // 2, use_clipped_model_output=False) > 0.01
    assert step_difference(*arguments, False, T // 2, use_clipped_model_output=False) < 1e-11


def test_known_bad_variants_are_caught(monkeypatch):
    # A step to the wrong neighbour, the posterior with a missing square root, another spacing.
    ours, _, name, their_options, step_options = PAIRS["DDPM, posterior variance"]
    monkeypatch.setitem(PAIRS, "swapped", (ours, {"variance": "beta"}, name, their_options, step_options))
    assert step_difference("swapped", "linear", "v", True, T // 2) > 1e-4
    assert chain_difference("DDIM, eta 0", "linear", "v", True, 20, spacing="linspace") > 1e-3
    assert chain_difference("DPM-Solver++ (2M)", "linear", "v", True, 20, spacing="leading") > 1e-3
    monkeypatch.setitem(PAIRS, "first order", ("ddpm", *PAIRS["DPM-Solver++ (2M) of the SDE"][1:]))
    assert chain_difference("first order", "linear", "v", True, 20) > 1e-3
