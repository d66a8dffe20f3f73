"""A small convolutional classifier of square greyscale images; its penultimate layer is what samples are scored in."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 128
CHUNK = 500  # `classify` always runs the network on this many images, so that an image's bits depend on no other


class Classifier(nn.Module):
    """Logits of square greyscale images.

    The stem strides until the image is at most 32 pixels wide, so that every size costs about the same.

    Args:
        size: height and width of the images in pixels.
        num_classes: K.
    """

    def __init__(self, size: int, num_classes: int) -> None:
        super().__init__()
        stride = -(-size // 32)
        width = -(-size // stride)
        for _ in range(2):
            width = -(-width // 2)
        self.body = nn.Sequential(
            _convolution(1, 16, kernel=2 * stride + 1, stride=stride),
            _convolution(16, 32, stride=2),
            _convolution(32, 32),
            _convolution(32, 64, stride=2),
            _convolution(64, 64),
            nn.Flatten(),
        )
        self.embed = nn.Sequential(nn.Linear(64 * width**2, FEATURES, bias=False), nn.BatchNorm1d(FEATURES, affine=False))
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, 128) float32: the last hidden layer before its ReLU, scaled to about unit variance on training images.

        Args:
            x: (B, 1, size, size) float32 in [-1, 1].
        """
        return self.embed(self.body(x.contiguous(memory_format=torch.channels_last)))

    def logits(self, features: Tensor) -> Tensor:
        """(B, K) float32 of the features."""
        return self.head(F.relu(features))

    def forward(self, x: Tensor) -> Tensor:
        """(B, K) float32 logits of images (B, 1, size, size) float32 in [-1, 1]."""
        return self.logits(self.features(x))


@torch.inference_mode()
def classify(net: Classifier, chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Features, (N, 128) float32, and class probabilities, (N, K) float64, both on the CPU.

    Args:
        net: in eval mode.
        chunks: images, float32 in [-1, 1], CHUNK at a time; the last chunk may be shorter and is padded.
    """
    features, probabilities = [], []
    device = next(net.parameters()).device
    for x in chunks:
        padded = F.pad(x.to(device), (0, 0, 0, 0, 0, 0, 0, CHUNK - len(x)))
        f = net.features(padded)
        features.append(f[: len(x)].cpu())
        probabilities.append(net.logits(f)[: len(x)].double().softmax(1).cpu())
    return torch.cat(features), torch.cat(probabilities)


def shift(x: Tensor, pixels: int, rng: torch.Generator) -> Tensor:
    """Images moved by up to `pixels` on both axes, each by its own amount; the edge is repeated into the gap.

    Args:
        x: (B, 1, H, W) on any device.
        rng: on the CPU.
    """
    B, _, H, W = x.shape
    dy, dx = torch.randint(-pixels, pixels + 1, (2, B, 1), generator=rng)
    rows = (torch.arange(H) + dy).clamp(0, H - 1).to(x.device)  # (B, H)
    columns = (torch.arange(W) + dx).clamp(0, W - 1).to(x.device)  # (B, W)
    image = torch.arange(B, device=x.device)[:, None, None]
    return x[:, 0][image, rows[:, :, None], columns[:, None, :]][:, None]


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
