import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch

from stages.diffusion.schedules import noise_levels
from stages.networks.unet import UNet
from stages.training.recipe import Recipe
from stages.training.state import State
from stages.training.timetable import Timetable


@pytest.fixture
def recipe() -> Recipe:
    """Of batches of 8, with a warm-up of two of them."""
    return Recipe(
        prediction="v", weighting="balanced", precision="fp32", optimizer="muon", batch=8, lr=1e-3, halve_lr_every=None,
        warmup_images=16, grad_clip=1.0, label_dropout=0.1, ema_halflife=0.05,
    )  # fmt: skip


@pytest.fixture
def begin(recipe) -> Callable[..., State]:
    """The state before the first step of two phases, of 8 and 4 steps, with four reports each."""
    network = {"stem_resolution": 8, "base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_levels": []}
    torch.manual_seed(0)
    net = UNet(size=8, num_classes=2, **network, conditional=True)
    alpha_bar = torch.from_numpy(noise_levels("cosine", 30, size=8, reference_size=8, zero_terminal_snr=False))

    def begin(seed=0, **options):
        changed = dataclasses.replace(recipe, **options)
        return State.begin(copy.deepcopy(net), changed, Timetable.of([64, 32], 8, 4), alpha_bar, seed)

    return begin


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (8, 1, 8, 8), generator=rng, dtype=torch.uint8), torch.arange(8) % 2
