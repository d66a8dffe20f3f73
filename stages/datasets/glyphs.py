"""Persian digits and letters drawn from openly licensed fonts: synthetic, needs no download, deterministic by seed.

Every glyph of every face is turned once into a signed distance field. An image is one smooth warp of such a field, read at a
random threshold, which makes strokes bolder or finer without jagged edges, then inked onto noisy paper.
"""

import io
import math
import re
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from stages import UserError

LICENCE = "drawn from fonts under the SIL Open Font License 1.1 and the Bitstream Vera (DejaVu) licence"
CLASS_NAMES = list("۰۱۲۳۴۵۶۷۸۹ابپتثجچحخدذرزژسشصضطظعغفقکگلمنوهی")
FONT_PACKAGES = {  # distribution -> the files of it that are wanted; licences travel with the fonts
    "fontpkg-almarai": r".*-(Regular|Bold)\.ttf",
    "fontpkg-amiri": r".*-(Regular|Bold)\.ttf",
    "fontpkg-cairo": r".*\.ttf",
    "fontpkg-ibm-plex-sans-arabic": r".*-(Regular|Bold)\.ttf",
    "fontpkg-noto-kufi-arabic": r".*\.ttf",
    "fontpkg-noto-sans-arabic": r".*\.ttf",
    "matplotlib": r"DejaVuSans(Mono)?(-Bold)?\.ttf",
}
WEIGHTS = (400, 700)  # drawn from a font of variable weight
FIELD = 96  # pixels per side of a distance field
LARGE = 2 * FIELD  # pixels per side of the drawing that it is measured on
FILL = 0.8  # share of the field's side between the highest and the lowest ink of a face
LARGEST = 1.5  # times that scale for a glyph that leaves room
KNOTS = 5  # per side, of the random grid that an elastic distortion is interpolated from
BATCH = 256  # images warped at once


def fetch(folder: Path, **_: object) -> None:
    """Pack the installed fonts and their licences into folder/fonts.zip; the same fonts give the same bytes.

    Raises:
        UserError: a font package is not installed.
    """
    with zipfile.ZipFile(folder / "fonts.zip", "w", zipfile.ZIP_STORED) as archive:
        for package, pattern in FONT_PACKAGES.items():
            for name, path in sorted(_package_files(package, pattern).items()):
                archive.writestr(zipfile.ZipInfo(f"{package}/{name}", (1980, 1, 1, 0, 0, 0)), path.read_bytes())


def read(
    folder: Path, *, size: int, train_images: int, test_images: int, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """(images, labels) of the train split, of the test split, and the class names: the characters.

    Image i of a split depends on (seed, split, i) alone. Every block of 42 images holds each class once, shuffled.

    Returns:
        images: (N, 1, size, size) uint8, dark ink on light paper; labels: (N,) int64 in 0..41.

    Raises:
        UserError: fonts.zip is missing or damaged, or one of its fonts lacks a glyph.
    """
    fields, families = _load_fields(folder / "fonts.zip")
    train = _draw_split(fields, families, size, train_images, seed, 0)
    test = _draw_split(fields, families, size, test_images, seed, 1)
    return train, test, CLASS_NAMES


def _package_files(package: str, pattern: str) -> dict[str, Path]:
    try:
        found = distribution(package)
    except PackageNotFoundError:
        raise UserError(f"the font package {package} is not installed; `make repro` installs it") from None
    wanted = re.compile(rf"{pattern}|LICENSE(_DEJAVU)?")
    files = [file for file in found.files or [] if wanted.fullmatch(file.name) and ".dist-info" not in str(file)]
    return {file.name: Path(str(found.locate_file(file))) for file in files}


def _load_fields(archive: Path) -> tuple[Tensor, list[list[int]]]:
    """Distance fields, (faces, 42, FIELD, FIELD) float32, and the faces of each family."""
    fields: list[Tensor] = []
    families: dict[str, list[int]] = {}
    try:
        with zipfile.ZipFile(archive) as fonts:
            for name in sorted(fonts.namelist()):
                if name.endswith(".ttf"):
                    for face in _faces(f"{archive}: {name}", fonts.read(name)):
                        families.setdefault(name.split("/")[0], []).append(len(fields))
                        fields.append(_face_fields(face))
    except FileNotFoundError:
        raise UserError(f"{archive} is missing; `dvc repro` makes it") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and run `dvc repro`") from None
    return torch.stack(fields), list(families.values())


def _faces(name: str, content: bytes) -> Iterator[ImageFont.FreeTypeFont]:
    """The font at each of WEIGHTS that it has, or as it is when its weight is fixed."""
    characters = TTFont(io.BytesIO(content)).getBestCmap()
    if missing := [character for character in CLASS_NAMES if ord(character) not in characters]:
        raise UserError(f"{name} lacks {' '.join(missing)}; a font must have all {len(CLASS_NAMES)} glyphs")
    font = ImageFont.truetype(io.BytesIO(content), LARGE, layout_engine=ImageFont.Layout.BASIC)
    try:
        axes = font.get_variation_axes()
    except OSError:  # not a variable font
        yield font
        return
    for weight in WEIGHTS:
        font.set_variation_by_axes([weight if axis["name"] == b"Weight" else axis["default"] or 0 for axis in axes])
        yield font


def _face_fields(font: ImageFont.FreeTypeFont) -> Tensor:
    """(42, FIELD, FIELD) float32: distance to the outline in pixels of the field, positive in the ink.

    One baseline and nearly one scale serve the whole face: size and height on the line are what tells some letters from digits.
    Glyphs that would leave much of the paper empty are drawn larger.
    """
    drawings = [_drawing(font, character) for character in CLASS_NAMES]
    boxes = np.array([drawing.getbbox() for drawing in drawings])  # left, top, right, bottom
    top, bottom, widest = boxes[:, 1].min(), boxes[:, 3].max(), (boxes[:, 2] - boxes[:, 0]).max()
    middle, half = (top + bottom) / 2, max(bottom - top, 0.95 * widest) / FILL / 2
    reach = np.stack([boxes[:, 2] - boxes[:, 0], 2 * np.abs(boxes[:, 1] - middle), 2 * np.abs(boxes[:, 3] - middle)]).max(axis=0)
    halves = np.maximum(half / LARGEST, np.minimum(reach / FILL / 2, half))
    windows = [(x - r, middle - r, x + r, middle + r) for x, r in zip((boxes[:, 0] + boxes[:, 2]) / 2, halves, strict=True)]
    masks = [
        drawing.resize((LARGE, LARGE), Image.Resampling.BILINEAR, box=window)
        for drawing, window in zip(drawings, windows, strict=True)
    ]
    distances = torch.from_numpy(np.stack([_signed_distance(np.asarray(mask) > 127) for mask in masks]))
    return F.avg_pool2d(distances[:, None], LARGE // FIELD)[:, 0] * (FIELD / LARGE)


def _drawing(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    canvas = Image.new("L", (4 * LARGE, 4 * LARGE))
    ImageDraw.Draw(canvas).text((2 * LARGE, 2 * LARGE), character, fill=255, font=font, anchor="ms")
    return canvas


def _signed_distance(ink: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.where(ink, distance_transform_edt(ink) - 0.5, 0.5 - distance_transform_edt(~ink)).astype(np.float32)


def _rng(seed: int, stream: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))


def _balanced_labels(count: int, seed: int, split: int) -> Tensor:
    blocks = -(-count // len(CLASS_NAMES))
    order = np.concatenate([_rng(seed, 2 + split, block).permutation(len(CLASS_NAMES)) for block in range(blocks)])
    return torch.from_numpy(order[:count].astype(np.int64))


def _draw_split(fields: Tensor, families: list[list[int]], size: int, count: int, seed: int, split: int) -> tuple[Tensor, Tensor]:
    labels = _balanced_labels(count, seed, split)
    images = torch.empty(count, 1, size, size, dtype=torch.uint8)
    for start in range(0, count, BATCH):
        batch = slice(start, min(start + BATCH, count))
        draws = [_draw(_rng(seed, split, i), families, size) for i in range(batch.start, batch.stop)]
        faces, *rest = (torch.from_numpy(np.stack(part)) for part in zip(*draws, strict=True))
        images[batch] = _ink(fields[faces, labels[batch]][:, None], *rest)
    return images, labels


def _draw(rng: np.random.Generator, families: list[list[int]], size: int) -> tuple[NDArray[np.float32] | np.int64, ...]:
    """Everything random about one image: its face, affine map (2, 3), elastic knots, tones, and the grain of its paper."""
    face = rng.choice(families[rng.integers(len(families))])
    turn, slant = math.radians(rng.normal(0, 2.5)), rng.normal(0.05, 0.06)
    across, down = rng.uniform(0.92, 1.08) * np.exp(rng.normal(0, 0.04, 2))
    # Where each pixel of the image comes from, in [-1, 1] of the field: zoomed, slanted, turned, moved.
    linear = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]] @ np.array([[1, slant], [0, 1]])
    affine = np.column_stack([linear * [across, down], rng.uniform(-0.04, 0.04, 2)])
    knots = rng.normal(0, 1, (3, KNOTS, KNOTS)) * np.array([0.025, 0.025, 3])[:, None, None]  # across, down, shade
    tones = np.array(
        [
            rng.uniform(0.6, 1.2),  # how much bolder, in pixels of the field
            rng.uniform(0.6, 1.0),  # sharpness of the edge
            rng.uniform(15, 80),  # ink
            rng.uniform(205, 240),  # paper
        ]
    )
    grain = rng.uniform(2, 4) * rng.standard_normal((size, size), np.float32)
    return np.int64(face), *(part.astype(np.float32) for part in (affine, knots, tones, grain))


def _ink(fields: Tensor, affine: Tensor, knots: Tensor, tones: Tensor, grain: Tensor) -> Tensor:
    """(B, 1, H, W) uint8: the fields, warped, read at their thresholds, inked onto paper."""
    size = grain.shape[-2:]
    smooth = F.interpolate(knots, size=size, mode="bicubic", align_corners=True)
    where = F.affine_grid(affine, [len(fields), 1, *size], align_corners=False) + smooth[:, :2].permute(0, 2, 3, 1)
    distance = F.grid_sample(fields, where, padding_mode="border", align_corners=False)
    bolder, sharpness, ink, paper = (tone[:, None, None, None] for tone in tones.unbind(1))
    cover = (0.5 + (distance + bolder) * sharpness * size[0] / FIELD).clamp(0, 1)
    sheet = paper + smooth[:, 2:]
    return (sheet + cover * (ink - sheet) + grain[:, None]).round().clamp(0, 255).to(torch.uint8)
