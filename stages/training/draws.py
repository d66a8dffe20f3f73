"""The randomness of training: which images a step sees, and with what noise. All of it is a function of (seed, step)."""

import functools

import numpy as np
import torch
from torch import Tensor

NOISE, ORDER = 0, 1  # streams of random numbers


def generator(seed: int, stream: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each seed, stream (NOISE or ORDER) and index of a step or an epoch.

    Hashed, for torch's generator on the CPU keeps 32 bits of a seed and drops the others.
    """
    hashed = np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(hashed[0]))


def batch_of_step(step: int, batch: int, n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """(batch,) int64 indices of a step, the first is 1, in an endless row of shuffled epochs of n images."""
    first, end = (step - 1) * batch, step * batch
    parts = []
    while first < end:
        epoch, offset = divmod(first, n)
        parts.append(_shuffled(n, seed, epoch, str(device))[offset : offset + end - first])
        first += len(parts[-1])
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)
def _shuffled(n: int, seed: int, epoch: int, device: str) -> Tensor:
    """A whole epoch goes to the device at once: a copy for every step would make every step wait."""
    return torch.randperm(n, generator=generator(seed, ORDER, epoch)).to(device)


def stratified_timesteps(batch: int, T: int, rng: torch.Generator) -> Tensor:
    """(batch,) int64 in 0..T-1, each uniform, one from each of `batch` equal parts of the range: less noise in the loss."""
    strata = torch.arange(batch, device=rng.device, dtype=torch.float64)
    jitter = torch.rand(batch, device=rng.device, dtype=torch.float64, generator=rng)
    return ((strata + jitter) / batch * T).long().clamp_max(T - 1)
