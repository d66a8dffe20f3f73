"""The denoising network: a small U-Net on space-to-depth patches, told the log-SNR and the label."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """U-Net of Ho et al. 2020 at the size of handwriting, for square greyscale images of any size.

    A stem folds patches of f x f pixels into channels, f the smallest power of two that brings the image to at most
    `stem_resolution` pixels a side, so a 64x64 image costs about what a 28x28 one does. Zero padding up to a size that every
    level can halve is taken off again at the end.

    Args:
        size: pixels a side.
        num_classes: labels 0..num_classes-1; the label num_classes means "not told".
        stem_resolution, base_channels, channel_mult, blocks_per_level, attention_levels, conditional: see params.yaml.
    """

    def __init__(
        self,
        *,
        size: int,
        num_classes: int,
        stem_resolution: int,
        base_channels: int,
        channel_mult: Sequence[int],
        blocks_per_level: int,
        attention_levels: Sequence[int],
        conditional: bool,
    ) -> None:
        super().__init__()
        fold = 2 ** max(0, math.ceil(math.log2(size / stem_resolution)))
        multiple = fold * 2 ** (len(channel_mult) - 1)
        self.padding = -size % multiple
        widths = [base_channels * mult for mult in channel_mult]
        emb = 4 * base_channels
        self.num_classes, self.conditional = num_classes, conditional
        if conditional:
            self.embed_label = nn.Embedding(num_classes + 1, 2 * base_channels)
            self.template = Template(num_classes + 1, widths[-1], (size + self.padding) // multiple, emb)
        self.embed = nn.Sequential(nn.Linear(2 * base_channels, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.logspace(-4, 1, base_channels, base=2), persistent=False)

        # Going down, every output is kept for the way up.
        self.unfold, self.fold = nn.PixelUnshuffle(fold), nn.PixelShuffle(fold)
        self.stem = nn.Conv2d(fold**2, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = widths[0], []
        for level, width in enumerate(widths):
            if level > 0:
                self.down.append(Downsample(channels, width))
                channels = width
            self.coarsest = len(self.down)  # in the end, where the coarsest level begins
            for _ in range(blocks_per_level):
                self.down.append(Block(channels, width, emb, attention=level in attention_levels))
                channels = width
                skips.append(channels)
        self.middle = Block(channels, channels, emb, attention=len(widths) - 1 in attention_levels)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks_per_level):
                self.up.append(Block(channels + skips.pop(), width, emb, attention=level in attention_levels))
                channels = width
            if level > 0:
                self.up.append(Upsample(channels, widths[level - 1]))
                channels = widths[level - 1]
        self.norm, self.bypass = _norm(channels), nn.Linear(emb, fold**2)
        self.head = _zero(nn.Conv2d(channels + fold**2, fold**2, 3, padding=1))

    def forward(self, x_t: Tensor, logsnr: Tensor, y: Tensor) -> Tensor:
        """What the network predicts (eps, x0 or v), shaped like x_t.

        Args:
            x_t: (B, 1, H, W) float32.
            logsnr: (B,) float, the noise level of each image; beyond +-30 it is told as +-30.
            y: (B,) int64 labels; num_classes where the label is withheld.
        """
        told = self._waves(logsnr)  # (B, 2 base_channels)
        emb = self.embed(told + self.embed_label(y) if self.conditional else told)  # (B, E)
        p, size = self.padding, x_t.shape[-1]
        h = F.pad(x_t, (p // 2, p - p // 2) * 2) if p else x_t
        patches = self.unfold(h).contiguous(memory_format=torch.channels_last)  # (B, f*f, H/f, W/f)
        h = self.stem(patches)  # (B, C, H/f, W/f)
        skips = []
        for i, layer in enumerate(self.down):
            if self.conditional and i == self.coarsest:
                h = h + self.template(y, emb).to(h.dtype)
            h = layer(h, emb)
            if isinstance(layer, Block):
                skips.append(h)
        h = self.middle(h, emb)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1) if isinstance(layer, Block) else h, emb)
        # Past the trunk, x_t as loud as the noise level asks for: its channels need not carry the noise of every pixel.
        bypass = patches * self.bypass(emb)[:, :, None, None]
        h = self.fold(self.head(torch.cat([F.silu(self.norm(h)), bypass], dim=1)))  # (B, 1, H + p, W + p)
        return h[..., p // 2 : p // 2 + size, p // 2 : p // 2 + size]

    def _waves(self, logsnr: Tensor) -> Tensor:
        angles = logsnr.float().clamp(-30, 30)[:, None] * self.frequencies  # (B, base_channels)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """Residual block, scaled and shifted by the embedding (FiLM), with self-attention after it where asked."""

    def __init__(self, channels: int, width: int, emb: int, *, attention: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), nn.Conv2d(channels, width, 3, padding=1)
        self.film = nn.Linear(emb, 2 * width)
        self.norm2, self.conv2 = _norm(width), _zero(nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()
        self.attention = Attention(width) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, width, H, W) from x (B, channels, H, W) and emb (B, E)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)  # (B, width, 1, 1) each
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return self.attention(self.skip(x) + h)


class Template(nn.Module):
    """A picture for each label, at the coarsest resolution, as loud as the noise level asks for.

    The embedding alone acts on all places alike; where the strokes of a label lie would have to come from the image's border.
    """

    def __init__(self, labels: int, channels: int, side: int, emb: int) -> None:
        super().__init__()
        self.gain = nn.Linear(emb, channels)
        self.pictures = nn.Parameter(0.3 * torch.randn(labels, channels, side, side))

    def forward(self, y: Tensor, emb: Tensor) -> Tensor:
        """(B, C, side, side) from labels y (B,) and emb (B, E)."""
        # Not pictures[y]: on a CPU its threads would add up the gradients of a label in the order in which they happen to come.
        pictures = F.embedding(y, self.pictures.flatten(1)).unflatten(1, self.pictures.shape[1:])
        return pictures * (1 + self.gain(emb))[:, :, None, None]


class Attention(nn.Module):
    """Self-attention over all positions, four heads, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) from the same."""
        b, c, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, 4, c // 4, height * width).transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 4, HW, C/4)
        return x + self.out(h.transpose(-1, -2).reshape(b, c, height, width))


class Downsample(nn.Module):
    """Half the resolution: 2x2 patches folded into channels, then mixed down to the width."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, width, 2, stride=2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, width, H/2, W/2) from x (B, channels, H, W)."""
        return self.mix(x)


class Upsample(nn.Module):
    """Twice the resolution: channels mixed, then unfolded into 2x2 patches; far cheaper than a 3x3 at the full resolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mix, self.unfold = nn.Conv2d(channels, 4 * width, 1), nn.PixelShuffle(2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, width, 2H, 2W) from x (B, channels, H, W)."""
        return self.unfold(self.mix(x))


def _norm(channels: int) -> nn.GroupNorm:
    """Normalisation over a whole image: one group, because several cost up to nine times more in channels-last memory."""
    return nn.GroupNorm(1, channels)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with zero weights: its residual branch begins as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
