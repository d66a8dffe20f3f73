"""A trained network, built again from its file."""

from pathlib import Path
from typing import Any

import torch

from stages.drawing.weights import device, load_tensors
from stages.errors import sound
from stages.networks.unet import UNet


def load_network(path: Path) -> tuple[UNet, dict[str, Any]]:
    """A trained network in eval mode on `device()`, and what its file says: network, diffusion, num_classes, size, ...

    A short chain may start at more noise than any that the network learnt. There images hardly show, so it is told the noisiest
    level that it knows.
    """
    weights, about = load_tensors(path)
    with sound(path):
        net = UNet(size=about["size"], num_classes=about["num_classes"], **about["network"])
        net.load_state_dict(weights)
        noisiest = float(about["logsnr"][0])
    net.register_forward_pre_hook(lambda _, told: (told[0], told[1].clamp(min=noisiest), told[2]))
    return net.to(device(), memory_format=torch.channels_last).eval(), about  # type: ignore[call-overload]
