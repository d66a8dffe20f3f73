"""Persian digits and letters as many hands write them: synthetic, needs no download, deterministic by seed.

A form is a path for the pen: drawn here by its control points, or thinned out of an openly licensed font. Every form is turned
once into a field of distances from that path. An image is one smooth warp of such a field, read at the width of a pen that
presses more or less along its way, then inked onto paper.
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
from scipy.interpolate import CubicSpline
from scipy.ndimage import center_of_mass, distance_transform_edt, label
from torch import Tensor

from stages.datasets.splits import Dataset, dataset
from stages.errors import UserError

LICENCE = "pen strokes of this repository, and fonts under the SIL Open Font License 1.1 and the Bitstream Vera (DejaVu) licence"
CLASS_NAMES = list("۰۱۲۳۴۵۶۷۸۹ابپتثجچحخدذرزژسشصضطظعغفقکگلمنوهی")
FONT_PACKAGES = {  # distribution -> the files of it that are wanted; licences travel with the fonts
    "fontpkg-almarai": r".*-Regular\.ttf",
    "fontpkg-amiri": r".*-Regular\.ttf",
    "fontpkg-cairo": r".*\.ttf",
    "fontpkg-ibm-plex-sans-arabic": r".*-Regular\.ttf",
    "fontpkg-noto-sans-arabic": r".*\.ttf",
    "matplotlib": r"DejaVuSans\.ttf",
}
FONT_VARIANTS = {"۴": "٤", "۵": "٥", "۶": "٦", "ک": "ك", "ه": "ھ", "ی": "ي"}  # also written so, where a font has it

# What a pen does, on a page 100 wide and high, y downwards: the forms in which each digit and letter is written; in a form,
# strokes apart by a semicolon; in a stroke, the points that a smooth curve runs through.
STROKES = {
    "۰": [
        "50,39 60,44 61,54 52,61 41,57 39,46 50,39",
        "50,33 65,42 66,57 53,66 36,59 34,42 50,33",
        "48,41 60,43 58,58 46,60 40,50 49,40",
        "50,44 56,50 50,56 44,50 50,44",
        "45,46 54,46 54,54 46,54 47,48 52,50",
    ],
    "۱": [
        "46,16 50,50 54,84",
        "38,18 50,50 62,84",
        "34,28 44,18 49,50 54,84",
    ],
    "۲": [
        "28,13 30,22 38,50 48,89; 30,22 42,39 60,39 72,28 74,11",
        "26,12 28,20 36,50 42,90; 28,20 44,30 60,26 72,12",
        "34,90 36,50 32,16; 32,16 48,22 74,26",
        "78,12 66,32 48,40 26,14; 48,40 50,62 52,90",
        "74,14 56,16 38,26 33,50 40,89",
    ],
    "۳": [
        "18,14 20,22 30,50 42,90; 20,22 28,36 40,38 48,28 50,14; 48,28 56,38 70,38 78,26 82,10",
        "18,14 20,20 30,50 40,90; 20,20 34,28 46,22 48,14; 46,22 60,30 74,26 84,12",
        "20,16 30,50 36,90; 20,16 40,25 50,18; 50,18 62,27 82,22",
        "16,24 24,42 36,46 42,30; 42,30 50,46 64,44 74,30 78,14; 24,42 32,60 46,88",
        "24,14 26,20 34,50 40,90; 26,20 52,24; 52,24 54,12; 52,24 80,26",
    ],
    "۴": [
        "26,12 32,33 44,90; 32,33 49,35 78,38; 74,11 58,13 48,23 49,35",
        "30,14 34,40 44,90; 34,40 57,37 82,34; 80,11 60,15 52,26 57,37",
        "80,10 52,22 34,38; 34,38 56,42 80,40; 24,15 34,38 50,90",
        "22,24 36,44 60,90; 36,44 54,34 76,10; 54,34 66,40 82,42",
        "32,90 34,50 31,20; 31,20 54,23 76,22; 54,23 58,14 72,11",
        "66,12 44,18 40,32 54,44 64,46; 64,46 42,52 33,68 46,86 72,86",
        "68,14 42,20 38,38 58,46; 58,46 38,58 34,76 50,88 70,80",
        "50,12 34,20 32,32 48,40; 48,40 30,56 26,74 52,84 84,80",
        "78,12 66,22 50,26 40,38 60,46 78,40; 26,18 40,38 54,90",
    ],
    "۵": [
        "50,12 30,40 20,66 30,84 44,80 50,66; 50,66 58,82 74,82 80,64 68,36 50,12",
        "46,16 66,36 76,62 60,84 36,84 24,64 34,36 46,16",
        "42,13 62,30 74,56 70,78 56,80 48,66; 48,66 42,82 26,84 18,70 26,54 40,46 60,44",
        "40,14 60,28 78,52 76,72 60,78; 60,78 46,66 42,72 34,82 20,74 22,56 36,44 56,36",
        "52,14 36,36 22,60 24,78 50,80 76,80 80,64 66,36 50,14",
        "50,16 74,30 82,54 68,80 40,84 20,66 24,36 50,16",
        "36,12 60,36 76,64 50,84 26,66 40,38 66,14",
        "24,12 44,34 70,60 66,78 46,84 28,72 34,52 54,36 76,18",
        "30,14 56,32 82,62 70,82 52,70; 52,70 44,84 28,82 20,64 30,46 52,32",
    ],
    "۶": [
        "36,14 26,34 34,48 60,46; 74,12 60,46 42,90",
        "66,13 46,12 32,26 38,42 68,42; 68,42 50,62 38,90",
        "38,16 28,36 38,46 54,40 62,30; 72,12 62,30 50,60 34,90",
        "30,18 34,44 58,48 76,40; 72,14 58,48 34,88",
        "30,20 44,24 64,18; 64,18 66,50 70,90",
        "24,24 30,16 52,22 68,18; 68,18 58,48 64,78 80,86",
        "34,16 28,40 42,49 66,45; 68,14 66,45 66,90",
        "26,22 42,27 64,21; 64,21 66,56 76,88",
    ],
    "۷": [
        "22,13 36,48 48,88; 48,88 62,48 78,12",
        "20,42 30,40 42,86; 42,86 56,50 84,18",
        "18,20 28,16 40,46 48,88; 48,88 58,50 76,14",
        "26,14 34,60 46,86 57,80; 57,80 64,44 76,12",
    ],
    "۸": [
        "50,12 36,50 22,88; 50,12 64,50 78,88",
        "46,14 40,46 18,86; 46,14 62,50 84,82",
        "32,18 50,13 46,40 20,88; 50,13 62,50 80,88",
        "52,12 32,46 24,88; 52,12 70,40 78,88",
    ],
    "۹": [
        "62,34 46,46 30,36 36,18 54,12 64,26; 64,26 66,54 76,90",
        "60,38 42,46 28,32 38,15 56,15 62,32; 62,32 62,60 60,90",
        "58,36 40,42 28,28 42,13 58,18 62,36; 62,36 70,62 84,86",
        "66,40 44,48 30,34 44,14 66,18; 66,18 66,52 46,90",
        "68,46 44,56 24,44 36,22 60,14 68,30; 68,30 68,62 82,90",
        "56,14 34,22 32,40 54,42 62,16; 62,16 60,44 72,74 80,86",
    ],
    "ا": ["51,8 50,50 49,92", "54,8 50,60 40,92", "48,8 50,92"],
    "ب": ["88,38 88,54 74,62 50,65 26,62 13,54 13,38", "86,44 84,58 50,64 20,58 12,40", "88,34 86,58 60,62 22,62 14,46"],
    "ج": [
        "20,36 34,26 54,30 78,26; 78,26 50,38 30,58 34,80 56,90 78,82",
        "22,34 76,28; 76,28 42,46 28,66 42,88 76,86",
        "24,30 40,24 60,32 80,28; 80,28 56,34 34,50 28,68 40,86 62,90 80,80",
    ],
    "د": ["44,18 60,40 68,62 58,76 28,78", "50,20 64,50 62,72 30,74", "46,16 52,40 66,66 50,76 26,70"],
    "ر": ["62,34 68,56 58,78 28,90", "60,34 66,56 50,80 32,88", "66,34 62,64 24,90"],
    "س": [
        "90,32 86,48 74,50 70,37; 70,37 66,50 56,50 52,36; 52,36 52,62 42,78 26,80 14,70 12,50",
        "92,36 84,47 68,46 52,40; 52,40 54,62 44,80 26,82 13,70 11,52",
        "90,40 70,46 54,40; 54,40 56,60 44,76 28,78 16,68 12,54",
    ],
    "ص": [
        "48,60 60,42 76,34 90,44 82,57 62,60 48,60; 48,45 48,60 42,80 26,82 13,70 11,54",
        "48,60 70,36 88,42 80,58 48,60; 45,47 48,60 36,82 18,78 12,56",
        "48,60 72,36 90,46 74,58 48,60; 46,48 48,60 42,82 24,82 12,66 12,54",
    ],
    "ط": [
        "40,10 41,65; 41,65 56,44 76,40 86,52 74,64 42,67 20,66",
        "44,10 38,66; 38,66 60,42 82,48 76,64 22,68",
        "46,10 44,66; 44,66 58,48 80,46 80,62 60,66 18,66",
    ],
    "ع": [
        "70,30 52,20 36,32 46,46 69,46; 69,46 40,52 28,68 38,86 60,91 78,84",
        "66,28 46,24 40,38 66,46; 66,46 34,60 34,82 74,88",
        "64,26 48,24 42,36 54,44 72,40; 54,44 36,54 26,72 36,88 60,90 80,80",
    ],
    "ف": [
        "84,46 70,50 64,40 74,30 85,40 84,56 70,64 40,66 16,60 11,46",
        "82,48 68,46 72,32 86,40 82,60 50,66 18,62 12,44",
        "80,48 66,48 66,34 78,30 84,44 78,62 56,66 30,66 14,60 10,50",
    ],
    "ق": [
        "74,46 60,50 52,40 60,29 74,36 76,56 66,78 46,88 26,80 20,62",
        "72,46 56,44 62,30 76,42 70,72 44,86 22,74 22,58",
        "70,48 56,48 52,36 64,28 74,40 74,62 58,82 36,84 20,70 18,56",
    ],
    "ک": [
        "80,12 44,34; 44,34 66,48 78,60 66,70 36,72 14,64 12,52",
        "78,14 46,36; 46,36 74,54 76,70 20,72",
        "84,18 39,28; 39,28 56,44 70,62 60,72 22,72 14,60",
    ],
    "گ": [
        "82,22 44,40; 44,40 66,52 78,64 66,74 36,76 14,68 12,56; 74,8 40,26",
        "80,20 48,38; 48,38 76,58 70,76 20,74; 66,8 40,22",
        "84,26 42,40; 42,40 60,54 72,68 58,78 24,76 12,62; 78,10 42,22",
    ],
    "ل": ["68,8 67,56 58,80 40,86 24,76 20,58", "66,8 66,64 52,86 26,82 20,62", "62,8 66,66 46,86 26,76 20,58"],
    "م": [
        "44,50 54,34 68,34 70,46 58,52 44,50; 44,50 38,62 38,92",
        "43,47 60,32 72,44 56,54 43,47; 43,47 36,66 40,92",
        "42,46 56,36 66,44 58,54 42,46; 42,46 40,66 42,90",
    ],
    "ن": ["80,34 83,56 72,78 48,84 26,76 17,56 20,38", "80,40 76,72 48,86 22,70 20,44", "82,44 84,62 66,82 42,84 22,68 22,50"],
    "و": [
        "70,46 56,52 44,42 54,26 68,32 73,48 66,68 48,82 26,86",
        "68,44 48,46 54,28 70,36 68,66 30,84",
        "68,50 52,52 46,38 58,28 70,40 68,60 54,76 34,82",
    ],
    "ه": [
        "48,24 62,42 68,60 56,72 40,68 34,54 50,40",
        "58,26 44,40 34,58 44,72 62,70 68,56 52,36",
        "40,30 58,40 66,58 54,70 38,62 44,44 62,34",
    ],
    "ی": [
        "80,32 66,24 54,34 62,48 76,56 70,76 46,84 22,76 16,58",
        "78,30 58,28 60,46 76,58 60,80 28,80 16,62",
        "76,26 54,32 62,46 70,58 48,66 22,74 40,84 86,84",
    ],
}
DOTTED = {  # a letter: the letter whose strokes it has, how many dots on them, where; of ي only the number is used
    "ب": ("ب", 1, 50, 84),
    "پ": ("ب", 3, 50, 82),
    "ت": ("ب", 2, 50, 34),
    "ث": ("ب", 3, 50, 30),
    "ج": ("ج", 1, 56, 62),
    "چ": ("ج", 3, 56, 64),
    "ح": ("ج", 0, 0, 0),
    "خ": ("ج", 1, 50, 12),
    "ذ": ("د", 1, 42, 10),
    "ز": ("ر", 1, 58, 18),
    "ژ": ("ر", 3, 58, 20),
    "ش": ("س", 3, 68, 18),
    "ض": ("ص", 1, 72, 18),
    "ظ": ("ط", 1, 68, 22),
    "غ": ("ع", 1, 54, 12),
    "ف": ("ف", 1, 74, 14),
    "ق": ("ق", 2, 62, 15),
    "ن": ("ن", 1, 50, 40),
    "ي": ("ی", 2, 46, 92),
}
DOT = 1.3  # times as thick as the pen
DOT_PLACES = {0: [], 1: [(0, 0)], 2: [(-8, 0), (8, 0)], 3: [(-8, 4), (8, 4), (0, -8)]}  # around the middle of so many dots
COPIES = 8  # of each form of STROKES, with its points moved a little, and of each dotted glyph of a font
FIELD = 128  # pixels per side of a distance field
FILL = 0.8  # share of the field's side between the highest and the lowest ink of a face
LARGEST = 1.8  # times that scale for a glyph that leaves room
KNOTS = (4, 10)  # per side, of the random grids that coarse and fine variation is interpolated from
WRITTEN = 0.7  # share of images drawn from STROKES rather than a font
BATCH = 256  # images warped at once
STREAMS = {"train": (0, 2), "validation": (4, 3), "test": (1, 3)}  # of random numbers: for the images, and for their labels

Mask = NDArray[np.bool_]  # (FIELD, FIELD), ink is True
Points = NDArray[np.float64]  # (points, 2): x, y in pixels of the field
Field = NDArray[np.float32]  # (FIELD, FIELD)
Forms = list[tuple[list[int], list[int]]]  # for each class, its fields from STROKES and those from fonts


def fetch(folder: Path, **_: object) -> None:
    """Pack the installed fonts and their licences into folder/fonts.zip; the same fonts give the same bytes.

    Raises:
        UserError: a font package is not installed.
    """
    with zipfile.ZipFile(folder / "fonts.zip", "w", zipfile.ZIP_STORED) as archive:
        for package, pattern in FONT_PACKAGES.items():
            for name, path in sorted(_package_files(package, pattern).items()):
                archive.writestr(zipfile.ZipInfo(f"{package}/{name}", (1980, 1, 1, 0, 0, 0)), path.read_bytes())


def read(folder: Path, *, size: int, train_images: int, validation_images: int, test_images: int, seed: int) -> Dataset:
    """Three splits, and the class names: the characters.

    Image i of a split depends on (seed, split, i) alone and is by a hand of its own. Every block of 42 images holds each class
    once, shuffled; validation has the labels of test, as far as it goes.

    Returns:
        images: (N, 1, size, size) uint8, dark ink on light paper; labels: (N,) int64 in 0..41.

    Raises:
        UserError: fonts.zip is missing or damaged, or one of its fonts lacks a glyph.
    """
    fields, forms = _load_fields(folder / "fonts.zip")
    counts = {"train": train_images, "validation": validation_images, "test": test_images}
    train, validation, test = (_draw_split(fields, forms, size, count, seed, name) for name, count in counts.items())
    return dataset(train, validation, test, CLASS_NAMES, how="each drawn by itself")


def _package_files(package: str, pattern: str) -> dict[str, Path]:
    try:
        found = distribution(package)
    except PackageNotFoundError:
        raise UserError(f"the font package {package} is not installed; `make repro` installs it") from None
    wanted = re.compile(rf"{pattern}|LICENSE(_DEJAVU)?")
    files = [file for file in found.files or [] if wanted.fullmatch(file.name) and ".dist-info" not in str(file)]
    return {file.name: Path(str(found.locate_file(file))) for file in files}


def _load_fields(archive: Path) -> tuple[Tensor, Forms]:
    """Distance fields, (fields, FIELD, FIELD) float32 in pixels of the field, and which of them are forms of which class."""
    rng = np.random.default_rng(0)  # the same forms for every seed of a dataset
    fields: list[Field] = []
    forms: Forms = [([], []) for _ in CLASS_NAMES]

    def add(character: str, source: int, new: list[Field]) -> None:
        forms[CLASS_NAMES.index(character)][source].extend(range(len(fields), len(fields) + len(new)))
        fields.extend(new)

    for character in CLASS_NAMES:
        add(character, 0, _written_fields(character, rng))
    for font, variants in _fonts(archive):
        for character, new in _font_fields(font, variants, rng):
            add(character, 1, new)
    return torch.from_numpy(np.stack(fields)), forms


def _written_fields(character: str, rng: np.random.Generator) -> list[Field]:
    """COPIES of each form in STROKES, every point moved a little in each: strokes that share a point still do."""
    letter, count, x, y = DOTTED.get(character, (character, 0, 0, 0))
    centres = np.array([(x + right, y + (down if y < 50 else -down)) for right, down in DOT_PLACES[count]]).reshape(-1, 2)
    fields = []
    for form in STROKES[letter] * COPIES:
        shrink = rng.uniform([0.75, 0.88], [1.05, 1])
        points = {point: np.array(point.split(","), float) for point in re.split("[; ]+", form)}
        moved = {point: 50 + (place - 50) * shrink + rng.normal(0, 2.5, 2) for point, place in points.items()}
        strokes = [_curve(np.array([moved[point] for point in stroke.split()])) for stroke in form.split(";")]
        dots = centres + rng.normal(0, 2, 2)
        fields.append(_field(_trace([stroke * FIELD / 100 for stroke in strokes]), dots * FIELD / 100, rng))
    return fields


def _curve(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """A smooth curve through (n, 2) points."""
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1) ** 0.5)])
    return CubicSpline(along, points, bc_type="natural")(np.linspace(0, along[-1], 30))


def _fonts(archive: Path) -> Iterator[tuple[ImageFont.FreeTypeFont, dict[str, str]]]:
    """Each font, and which of FONT_VARIANTS it has: variant -> character."""
    try:
        with zipfile.ZipFile(archive) as fonts:
            for name in sorted(fonts.namelist()):
                if name.endswith(".ttf"):
                    yield _font(f"{archive}: {name}", fonts.read(name))
    except FileNotFoundError:
        raise UserError(f"{archive} is missing; `dvc repro` makes it") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and run `dvc repro`") from None


def _font(name: str, content: bytes) -> tuple[ImageFont.FreeTypeFont, dict[str, str]]:
    available = TTFont(io.BytesIO(content)).getBestCmap()
    if missing := [character for character in CLASS_NAMES if ord(character) not in available]:
        raise UserError(f"{name} lacks {' '.join(missing)}; a font must have all {len(CLASS_NAMES)} glyphs")
    font = ImageFont.truetype(io.BytesIO(content), FIELD, layout_engine=ImageFont.Layout.BASIC)
    return font, {variant: character for character, variant in FONT_VARIANTS.items() if ord(variant) in available}


def _font_fields(font: ImageFont.FreeTypeFont, variants: dict[str, str], rng: np.random.Generator) -> list[tuple[str, list[Field]]]:
    """(character, its fields) for the glyphs of a font and their variants, thinned to the path of a pen."""
    drawn = {character: character for character in CLASS_NAMES} | variants
    bodies, centres = zip(*map(_part, _masks(font, list(drawn)), drawn), strict=True)
    fields = []
    for character, path, dots in zip(drawn.values(), _thin(np.stack(bodies)), centres, strict=True):
        copies = COPIES if character in DOTTED else 1
        fields.append((character, [_field(path, dots, rng) for _ in range(copies)]))
    return fields


def _masks(font: ImageFont.FreeTypeFont, characters: list[str]) -> list[Mask]:
    """(FIELD, FIELD) bool, ink is True.

    One baseline and nearly one scale serve the whole face: size and height on the line are what tells some letters from digits.
    Glyphs that would leave much of the paper empty are drawn larger.
    """
    drawings = [_drawing(font, character) for character in characters]
    boxes = np.array([drawing.getbbox() for drawing in drawings])  # left, top, right, bottom
    top, bottom, widest = boxes[:, 1].min(), boxes[:, 3].max(), (boxes[:, 2] - boxes[:, 0]).max()
    middle, half = (top + bottom) / 2, max(bottom - top, 0.95 * widest) / FILL / 2
    reach = np.stack([boxes[:, 2] - boxes[:, 0], 2 * np.abs(boxes[:, 1] - middle), 2 * np.abs(boxes[:, 3] - middle)]).max(axis=0)
    halves = np.maximum(half / LARGEST, np.minimum(reach / FILL / 2, half))
    windows = [(x - r, middle - r, x + r, middle + r) for x, r in zip((boxes[:, 0] + boxes[:, 2]) / 2, halves, strict=True)]
    shape = (FIELD, FIELD)
    return [
        np.asarray(drawing.resize(shape, Image.Resampling.BILINEAR, box=window)) > 127
        for drawing, window in zip(drawings, windows, strict=True)
    ]


def _drawing(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    canvas = Image.new("L", (4 * FIELD, 4 * FIELD))
    ImageDraw.Draw(canvas).text((2 * FIELD, 2 * FIELD), character, fill=255, font=font, anchor="ms")
    return canvas


def _part(ink: Mask, character: str) -> tuple[Mask, Points]:
    """The glyph without its dots, and their centres, (dots, 2) x, y: its dots are the smallest parts, as many as it has."""
    parts, count = label(ink, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    small = 1 + np.argsort(sizes)[: min(DOTTED.get(character, ("", 0))[1], count - 1)]
    centres = np.array(center_of_mass(ink, parts, small)).reshape(-1, 2)[:, ::-1]
    return ink & ~np.isin(parts, small), centres


def _thin(ink: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Skeletons, one pixel wide, of (N, H, W) masks that leave their border free. Source: Zhang & Suen 1984."""
    flat, width = ink.ravel().copy(), ink.shape[2]
    around = [-width, 1 - width, 1, width + 1, width, width - 1, -1, -width - 1]  # clockwise from the north
    rounds = [((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6))]  # an outer pixel goes when, of both triples, one neighbour is paper
    inked, before = np.flatnonzero(flat), -1
    while len(inked) != before:
        before = len(inked)
        for triples in rounds:
            near = np.stack([flat[inked + step] for step in around])
            outer = (np.abs(near.sum(0) - 4) <= 2) & ((~near & np.roll(near, -1, axis=0)).sum(0) == 1)
            outer &= ~near[list(triples[0])].all(0) & ~near[list(triples[1])].all(0)
            flat[inked[outer]] = False
            inked = inked[~outer]
    thin = flat.reshape(ink.shape)
    for i in np.flatnonzero(~thin.any((1, 2))):  # a blob can vanish between two rounds: leave its middle
        thin[i][tuple(np.argwhere(ink[i]).mean(0).astype(int))] = True
    return thin


def _field(path: Mask, centres: Points, rng: np.random.Generator) -> Field:
    """Distance to the path of the pen in pixels of the field; less to dots, which are thicker."""
    distance = distance_transform_edt(~path)
    if len(centres):
        distance = np.minimum(distance, distance_transform_edt(~_trace(_dots(centres, rng))) / DOT)
    return distance.astype(np.float32)


def _dots(centres: Points, rng: np.random.Generator) -> list[Points]:
    """Strokes for dots: one each or, as hands in a hurry do, a dash for two, a caret or a dash and a dot for three."""
    centres = centres + rng.normal(0, FIELD / 100, centres.shape)
    dots = [np.stack([centre, centre + rng.normal(0, FIELD / 60, 2)]) for centre in centres]
    if len(centres) == 1 or rng.random() < 0.5:
        return dots
    if len(centres) == 2 or rng.random() < 0.5:
        return [centres[centres[:, 0].argsort()]]
    alone = np.abs(centres[:, 1] - np.median(centres[:, 1])).argmax()
    return [np.delete(centres, alone, axis=0), dots[alone]]


def _trace(strokes: list[Points]) -> Mask:
    canvas = Image.new("1", (FIELD, FIELD))
    for stroke in strokes:
        ImageDraw.Draw(canvas).line([(x, y) for x, y in stroke], fill=1)
    return np.asarray(canvas)


def _rng(seed: int, stream: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))


def _balanced_labels(count: int, seed: int, stream: int) -> Tensor:
    blocks = -(-count // len(CLASS_NAMES))
    order = np.concatenate([_rng(seed, stream, block).permutation(len(CLASS_NAMES)) for block in range(blocks)])
    return torch.from_numpy(order[:count].astype(np.int64))


def _draw_split(fields: Tensor, forms: Forms, size: int, count: int, seed: int, split: str) -> tuple[Tensor, Tensor]:
    stream, stream_of_labels = STREAMS[split]
    labels = _balanced_labels(count, seed, stream_of_labels)
    images = torch.empty(count, 1, size, size, dtype=torch.uint8)
    for start in range(0, count, BATCH):
        batch = slice(start, min(start + BATCH, count))
        draws = [_draw(_rng(seed, stream, i), forms[labels[i]], size) for i in range(batch.start, batch.stop)]
        chosen, *rest = (torch.from_numpy(np.stack(part)) for part in zip(*draws, strict=True))
        images[batch] = _ink(fields[chosen][:, None], *rest)
    return images, labels


def _draw(rng: np.random.Generator, forms: tuple[list[int], list[int]], size: int) -> tuple[NDArray[np.float32] | np.int64, ...]:
    """Everything random about one image: its field, affine map (2, 3), coarse and fine knots, tones, and the grain of its paper."""
    written, printed = forms
    form = rng.choice(written if rng.random() < WRITTEN else printed)
    turn, slant = math.radians(np.clip(rng.normal(0, 3.5), -9, 9)), np.clip(rng.normal(0, 0.1), -0.25, 0.25)
    across, down = rng.uniform(1.06, 1.22) * np.exp(rng.normal(0, 0.06, 2))
    # Where each pixel of the image comes from, in [-1, 1] of the field: zoomed, slanted, turned, moved.
    linear = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]] @ np.array([[1, slant], [0, 1]])
    affine = np.column_stack([linear * [across, down], rng.uniform(-0.03, 0.03, 2)])
    # How far each knot is moved across and down; how hard the pen presses there and how light the paper is; how the ink flows.
    coarse = rng.normal(0, 1, (4, KNOTS[0], KNOTS[0])) * np.array([0.03, 0.03, 0.15, 3])[:, None, None]
    fine = rng.normal(0, 1, (3, KNOTS[1], KNOTS[1])) * np.array([0.008, 0.008, 1])[:, None, None]
    ruled, edged = rng.multinomial(1, [0.08, 0.05, 0.87])[:2]
    side = rng.integers(4) if edged else 1
    tones = np.array(
        [
            FIELD / 64 * np.clip(rng.lognormal(math.log(2.0), 0.22), 1.4, 3.0),  # half the width of the pen, in pixels of the field
            rng.uniform(0.6, 1.0),  # sharpness of its edge
            rng.uniform(15, 80),  # ink
            rng.uniform(200, 240),  # paper
            rng.choice([0.05, 0.15, 0.3], p=[0.6, 0.3, 0.1]),  # how much the ink fails
            side * math.pi / 2 + rng.normal(0, 0.03),  # direction across the rule or edge
            rng.uniform(0.8, 0.98) if edged else rng.uniform(0.3, 0.9),  # how far off the middle it is
            ruled * rng.uniform(20, 60),  # how dark a rule
            edged * rng.uniform(-20, 50),  # and the ground beyond an edge
        ]
    )
    grain = rng.uniform(1.5, 3) * rng.standard_normal((size, size), np.float32)
    return np.int64(form), *(part.astype(np.float32) for part in (affine, coarse, fine, tones, grain))


def _ink(fields: Tensor, affine: Tensor, coarse: Tensor, fine: Tensor, tones: Tensor, grain: Tensor) -> Tensor:
    """(B, 1, H, W) uint8: the fields, warped, read at the width of the pen, inked onto paper."""
    size = grain.shape[-1]
    coarse, fine = _interpolate(coarse, size), _interpolate(fine, size)
    where = F.affine_grid(affine, [len(fields), 1, size, size], align_corners=False)
    where = where + (coarse[:, :2] + fine[:, :2]).permute(0, 2, 3, 1)
    distance = F.grid_sample(fields, where, padding_mode="border", align_corners=False)
    pen, sharpness, ink, paper, failing, angle, offset, rule, edge = (tone[:, None, None, None] for tone in tones.unbind(1))
    cover = (0.5 + (pen * (1 + coarse[:, 2:3]) - distance) * sharpness * size / FIELD).clamp(0, 1)
    cover = cover * (1 - failing * fine[:, 2:].clamp(0, 2))
    line = torch.linspace(-1, 1, size)
    across = (angle.cos() * line + angle.sin() * line[:, None] - offset) * size / 2  # pixels from the rule or edge
    sheet = paper + coarse[:, 3:] - rule * (1 - across.abs()).clamp(min=0) - edge * (across + 0.5).clamp(0, 1)
    return (sheet + cover * (ink - sheet) + grain[:, None]).round().clamp(0, 255).to(torch.uint8)


def _interpolate(knots: Tensor, size: int) -> Tensor:
    """(B, C, size, size), smooth through (B, C, knots, knots)."""
    return F.interpolate(knots, size=(size, size), mode="bicubic", align_corners=True)
