"""Images laid out as one picture, or as an animation; pixel values are kept as they are."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stages.pipeline.files import whole_file

Pixels = NDArray[np.uint8]


def grid(images: Pixels, columns: int, *, scale: int = 1, gap: int = 1) -> Pixels:
    """One picture, (rows * (H + gap) + gap, columns * (W + gap) + gap) uint8, of images laid out row by row.

    Args:
        images: (N, 1, H, W) uint8, shown in their true range; the last row is filled up with the mid-grey of the gaps.
        scale: how many times each pixel is repeated, on both axes.
        gap: pixels of mid-grey between images, before scaling.
    """
    n, _, h, w = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap), 128, np.uint8)
    for i, image in enumerate(images[:, 0]):
        y, x = (i // columns) * (h + gap) + gap, (i % columns) * (w + gap) + gap
        canvas[y : y + h, x : x + w] = image
    return canvas.repeat(scale, 0).repeat(scale, 1)


def labelled(images: Pixels, rows: list[str], columns: list[str], *, scale: int = 1) -> Pixels:
    """A `grid` of len(rows) x len(columns) images on white, with a name at the left of each row and above each column."""
    pictures = grid(images, len(columns), scale=scale)
    font = ImageFont.load_default(size=14)
    left, top = 16 + round(max(font.getlength(name) for name in rows)), 24
    canvas = Image.new("L", (left + pictures.shape[1], top + pictures.shape[0]), 255)
    canvas.paste(Image.fromarray(pictures), (left, top))
    draw = ImageDraw.Draw(canvas)
    for i, name in enumerate(rows):
        draw.text((left - 8, top + (i + 0.5) * pictures.shape[0] / len(rows)), name, fill=0, font=font, anchor="rm")
    for j, name in enumerate(columns):
        draw.text((left + (j + 0.5) * pictures.shape[1] / len(columns), top / 2), name, fill=0, font=font, anchor="mm")
    return np.asarray(canvas)


def save_png(path: Path, pixels: Pixels) -> None:
    """Write a greyscale PNG, whole."""
    with whole_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", optimize=True)


def save_gif(path: Path, frames: list[Pixels], *, milliseconds: int) -> None:
    """Write an animation, whole, that rests on its last frame; pixel values are kept as they are, never stretched."""
    images = [Image.fromarray(frame) for frame in frames]
    with whole_file(path) as temporary:
        durations = [milliseconds] * (len(images) - 1) + [2000]
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
