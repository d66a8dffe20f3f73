import numpy as np
import torch

from stages.training.draws import NOISE, ORDER, batch_of_step, generator, stratified_timesteps


def test_every_epoch_visits_every_image_once_whatever_the_batch():
    for batch in (1, 7, 10, 33):
        steps = -(-30 // batch)
        seen = torch.cat([batch_of_step(step, batch, 10, seed=0) for step in range(1, steps + 1)])[:30]
        for epoch in seen.split(10):
            assert sorted(epoch.tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:20].tolist()


def test_every_seed_has_an_order_and_noise_of_its_own():
    assert batch_of_step(1, 32, 1000, 0).tolist() != batch_of_step(1, 32, 1000, 1).tolist()
    draws = {}
    for seed in (0, 1, 2**31 - 1):
        for stream in (NOISE, ORDER):
            for index in (0, 1, 2**20):
                rng = generator(seed, stream, index)
                draws[seed, stream, index] = tuple(torch.rand(2, generator=rng).tolist())
    assert len(set(draws.values())) == len(draws) == 18
    assert draws[1, 0, 1] == tuple(torch.rand(2, generator=generator(1, 0, 1)).tolist())


def test_timesteps_are_stratified_and_uniform():
    rng = torch.Generator().manual_seed(0)
    t = torch.stack([stratified_timesteps(64, 8, rng) for _ in range(200)])
    assert np.bincount(t.flatten(), minlength=8).tolist() == [1600] * 8  # 64 / 8 in every batch, exactly
    assert stratified_timesteps(5, 1, rng).tolist() == [0] * 5
