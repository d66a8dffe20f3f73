import functools
import itertools
import math

import numpy as np
import pytest
import scipy.sparse
import torch

from stages.diffusion import brownian, schedules
from stages.diffusion.brownian import LEVELS, Brownian, expansion, levels_for, snr
from stages.diffusion.noise import gaussian
from stages.diffusion.samplers import find
from stages.diffusion.schedules import noise_levels
from stages.diffusion.spacings import SPACINGS, spaced
from stages.errors import UserError

SHAPE = (1, 3, 3)
S = 0.6  # standard deviation of the Gaussian x0 whose denoiser is known
STOCHASTIC = [
    ("ddpm", {"variance": "posterior"}),
    ("ddpm", {"variance": "beta"}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("sde_dpm_solver_pp_2m", {}),
]


def table(schedule="cosine", T=1000, zero_terminal_snr=False):
    return torch.from_numpy(noise_levels(schedule, T, size=28, reference_size=28, zero_terminal_snr=zero_terminal_snr))


def gaussian_denoiser(x, a):
    """E[x0 | x_t] of x0 ~ N(0, S^2): linear in x_t."""
    return a.sqrt() * S**2 / (a * S**2 + 1 - a) * x


def increments(path, levels=None):
    """The rows of z of a chain, x_T first, in the basis of the xi: a sparse float64 matrix."""
    s = [0.0, *(snr(a) for a in path.tolist()[:-1])]
    levels = levels or levels_for(path)
    cells, factors = zip(*(expansion(v, levels) for v in s), strict=True)
    number = {cell: i for i, cell in enumerate(sorted(set(itertools.chain(*cells))))}
    rows = np.repeat(np.arange(len(s)), [len(c) for c in cells])
    heights = np.concatenate([np.array(f) * math.sqrt(v) for f, v in zip(factors, s, strict=True)])
    B = scipy.sparse.csr_matrix((heights, (rows, [number[c] for c in itertools.chain(*cells)])), (len(s), len(number)))
    return scipy.sparse.diags(1 / np.sqrt(np.diff(s))) @ (B[1:] - B[:-1])


def off_identity(z):
    """How far the Gram matrix of the rows is from 1; of long chains at most 300 rows, side by side and far apart, against all."""
    n = z.shape[0]
    some = np.union1d(np.arange(min(n, 150)) + n // 2 - min(n, 150) // 2, np.linspace(0, n - 1, min(n, 150), dtype=int))
    return abs(z[some] @ z.T - scipy.sparse.identity(n, format="csr")[some]).max()


CHAINS = [(200, steps, spacing) for steps in (5, 14, 200) for spacing in SPACINGS]
CHAINS += [(T, T, "trailing") for T in (50, 1000, 3200)]


@pytest.mark.parametrize("schedule", schedules.names())
@pytest.mark.parametrize(("T", "steps", "spacing"), CHAINS)
def test_the_increments_of_any_chain_are_orthonormal(schedule, spacing, T, steps):
    path = spaced(table(schedule, T), steps, spacing)
    assert levels_for(path) == LEVELS
    # An SNR is known to 2e-16, the difference of two that are 0.002 apart to 1e-13; 18 levels add their own roundings.
    assert off_identity(increments(path)) < (1e-12 if T <= 1000 else 1e-11)


def test_a_chain_that_needs_a_deeper_tree_has_one_and_two_levels_in_a_leaf_are_refused():
    path = spaced(table(T=4000), 4000, "trailing")
    assert levels_for(path) == LEVELS + 1
    assert off_identity(increments(path)) < 1e-11
    assert off_identity(increments(path, LEVELS)) > 0.01  # known-bad: B of two points in a leaf is not exact
    noise = Brownian(0, torch.arange(1), SHAPE, spaced(table(), 10, "trailing"))
    with pytest.raises(ValueError, match="share a leaf of the 18 levels"):
        noise(0.5, 0.50001)
    with pytest.raises(UserError, match=r"a chain of 20000 steps .* below -128; use a smaller T, or another schedule"):
        levels_for(spaced(table("linear_unscaled", 20_000), 20_000, "trailing"))


def test_a_deeper_tree_is_nearly_the_same_path():
    levels = torch.linspace(0.1, 0.9, 9).double()
    near = torch.cat([levels, levels[4:5] + 3e-4]).sort().values
    reads = [Brownian(0, torch.arange(300), SHAPE, torch.cat([path, torch.ones(1)])) for path in (levels, near)]
    assert levels_for(near) > LEVELS
    for a in levels:
        shallow, deep = (read(0, a) for read in reads)
        # Within a leaf, 0.002 of s, an arch stands for the tents below it: at most sqrt(0.002) / 2 of a standard deviation, twice.
        assert (shallow - deep).square().mean().sqrt() < 0.045


def test_a_tent_for_the_arch_of_a_leaf_is_noticed(monkeypatch):
    path = spaced(table(T=200), 200, "trailing")
    monkeypatch.setattr(brownian, "_arch", lambda s, left, right: brownian._tent(s, left, math.sqrt(left * right), right))
    assert off_identity(increments(path)) > 0.01


def sums(noise, path):
    """B(s) at every level of a path, from the increments that a sampler asks for: {alpha_bar: (N, *SHAPE) float64}."""
    at, total = 0.0, torch.zeros(())
    found = {}
    for a in path.tolist()[:-1]:
        total = total + math.sqrt(snr(a) - snr(at)) * noise(at, a).double()
        found[a], at = total, a
    return found


def test_the_increments_add_up_to_the_same_path_whatever_the_chain():
    full = table()
    mixed = torch.cat([full[49::50], table("linear", 30), torch.tensor([1.0])]).sort().values
    assert levels_for(mixed) == LEVELS
    paths = [spaced(full, 1000, "trailing"), spaced(full, 20, "trailing"), mixed]
    found = [sums(Brownian(5, torch.arange(4), SHAPE, path), path) for path in paths]
    common = functools.reduce(set.intersection, (set(each) for each in found))
    assert len(common) == 20
    for a in common:  # float32: 1e-7 of a standard deviation, through a thousand steps
        for each in found[1:]:
            torch.testing.assert_close(each[a], found[0][a], rtol=0, atol=1e-5 * math.sqrt(snr(a)))


def test_an_increment_is_that_of_its_levels_alone_and_of_its_index_alone():
    path = spaced(table(), 50, "trailing")
    many = Brownian(3, torch.arange(10), (1, 7, 9), path)
    steps = [(0, path[0]), *itertools.pairwise(path[:-1])]
    drawn = [many(*step) for step in steps]
    assert drawn[0].shape == (10, 1, 7, 9)
    assert drawn[0].dtype == torch.float32
    for i in (0, 7):
        one = Brownian(3, torch.tensor([i]), (1, 7, 9), path)
        for k in (30, 0, 49, 10):  # in any order
            assert torch.equal(one(*steps[k])[0], drawn[k][i]), (i, k)
    assert not torch.equal(Brownian(4, torch.arange(10), (1, 7, 9), path)(*steps[0]), drawn[0])


def test_increments_are_standard_normal_and_independent():
    path = spaced(table(), 14, "shifted_cosine")
    noise = Brownian(0, torch.arange(2000), SHAPE, path)
    z = torch.stack([noise(0, 0), noise(0, path[0]), *(noise(*step) for step in itertools.pairwise(path[:-1]))]).flatten(1).double()
    gram = z @ z.T / z.shape[1]
    # 18,000 draws: a mean square has standard deviation sqrt(2 / 18000), a correlation 1 / sqrt(18000); five of them.
    assert (gram.diagonal() - 1).abs().max() < 5 * math.sqrt(2 / 18_000)
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 5 / math.sqrt(18_000)


def test_without_any_signal_stands_a_noise_of_the_image_alone():
    path = spaced(table(zero_terminal_snr=True), 1000, "trailing")
    assert path[0] == 0
    noise = Brownian(2, torch.arange(3), SHAPE, path)
    assert torch.equal(noise(0, path[0]), gaussian(2, torch.arange(3), [0], SHAPE)[0])
    found, a = sums(noise, path[1:]), float(path[500])  # the first step, from nothing, is B(s) of where it ends
    torch.testing.assert_close(noise(path[0], a).double(), found[a] / math.sqrt(snr(a)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("sampler", "options"), STOCHASTIC)
@pytest.mark.parametrize(("schedule", "spacing", "steps"), [("cosine", "trailing", 200), ("linear", "shifted_cosine", 14)])
def test_the_variance_of_a_gaussian_chain_is_that_of_independent_noise(sampler, options, schedule, spacing, steps):
    """The denoiser is linear, so x is a vector of factors of the xi, and its variance their squares, exactly."""
    path = spaced(table(schedule, 200), steps, spacing)
    rows = {
        "path": torch.from_numpy(increments(path).toarray()),
        "independent": torch.eye(steps, dtype=torch.float64),
        "known-bad": torch.from_numpy(increments(path).toarray()).roll(1, dims=1).abs(),
    }
    place = {a: k for k, a in enumerate([0.0, *path.tolist()[:-2]])}
    variances = {}
    for name, z in rows.items():
        chain = find(sampler)(gaussian_denoiser, path, lambda a, _, z=z: z[place[float(a)]], **options)
        variances[name] = torch.stack([x.square().sum() for x, _ in chain])
    torch.testing.assert_close(variances["path"], variances["independent"], rtol=1e-11, atol=0)
    assert (variances["known-bad"] - variances["independent"]).abs().max() > 1e-3


def ends(sampler, schedule, T, steps, spacing="trailing", seed=0, **options):
    path = spaced(table(schedule, T), steps, spacing)
    noise = Brownian(seed, torch.arange(200), SHAPE, path)
    *_, (x, _) = find(sampler)(gaussian_denoiser, path, lambda *step: noise(*step).double(), **options)
    return x


@functools.cache
def ddpm_1000(seed=0):
    return ends("ddpm", "cosine", 1000, 1000, seed=seed)


@pytest.mark.parametrize(
    ("chain", "closest"),
    [
        (("ddpm", "cosine", 20, 20), 0.3),
        (("ddpm", "cosine", 200, 200), 0.05),
        (("ddpm", "linear", 200, 200), 0.1),
        (("ddpm", "sigmoid", 1000, 1000), 0.05),
        (("sde_dpm_solver_pp_2m", "cosine", 200, 50, "shifted_cosine"), 0.3),
    ],
)
def test_chains_of_one_image_end_alike_whatever_t_schedule_and_sampler(chain, closest):
    def apart(x, y):
        return ((x - y).square().mean().sqrt() / S).item()

    assert apart(ends(*chain), ddpm_1000()) < closest
    # Unrelated ones are sqrt(2) apart.
    assert apart(ends(*chain), ddpm_1000(seed=1)) == pytest.approx(math.sqrt(2), abs=0.15)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver_pp_2m", "heun"])
def test_chains_without_noise_start_from_one_x_t_and_end_alike(sampler):
    few, many = (ends(sampler, "cosine", T, T) for T in (20, 1000))
    assert (few - many).square().mean().sqrt() < 0.1 * S


def test_posterior_ancestral_sampling_is_ddim_with_eta_1_along_the_same_path():
    torch.testing.assert_close(ends("ddpm", "cosine", 100, 100), ends("ddim", "cosine", 100, 100, eta=1.0), rtol=0, atol=1e-9)
