"""Look at a person's own images, and add them to params.yaml as a dataset: says what it took them for, with a picture.

python -m stages.pipeline.own_data NAME PATH            `make data NAME=my_letters PATH=/home/me/letters`
"""

import argparse
import importlib.util
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stages.datasets import archive, auto, readers, zips
from stages.datasets.enough import refuse_too_few
from stages.datasets.pictures import Look
from stages.datasets.splits import Dataset
from stages.errors import UserError, in_one_line
from stages.pipeline import grids, params, sources

SHEETS = Path("data/looked")  # of no stage, and not in git
NAMED = 12  # classes that are listed
DARK = 128  # paper below is dark
EXAMPLES = 10  # images in a row of the contact sheet
TALLEST = 1500  # pixels; classes stand side by side rather than make the sheet higher
LONGEST = 20  # characters of a name in it
SHOWN = 56  # pixels, at least, of an image in it
ON_SHEET = 100  # classes in it
_UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # what ends a line, or is no text


def main(name: str, path: str) -> None:
    """Tell what lies at a path, and write the section `data.NAME` for it, whole or not at all.

    Raises:
        UserError: the name is none, or taken; there are no images, too few, or it is not clear what they are; or `make repro`
            runs.
    """
    params.refuse_while_repro()
    section, is_new = _asked(name, path)
    source = _absolute(path)
    with sources.scratch(f"looked-{name}") as folder:
        auto.fetch(folder, path=str(source))
        print(f"{name}: {_in_line(str(source))}")
        layout = auto.layout(folder / archive.FILE, f"path = {source}")
        looks = auto.looks(folder / archive.FILE, layout.members)
        if is_new and looks:
            section = _fitting(section, looks)
        _tell(_of_the_files(source, layout, looks))
        refuse_too_few(layout.class_names, _counts(torch.tensor(layout.labels), layout.class_names))
        found = _read(folder, section, source)
    images, labels = (torch.cat(parts) for parts in zip(*found.splits.values(), strict=True))
    _tell(_of_the_images(found))
    refuse_too_few(found.class_names, _counts(labels, found.class_names))
    _tell(_choices(section, found.report["size"], looks))
    sheet = SHEETS / f"{name}.png"
    grids.save_png(sheet, contact_sheet(images, labels, found.class_names))
    more = len(found.class_names) - ON_SHEET
    which = f"each of the first {ON_SHEET} classes ({more:,} are left out)" if more > 0 else "each class"
    print(f"\nSome images of {which}, as the network will see them: {sheet}")
    _write(name, section, is_new)


def _asked(name: str, path: str) -> tuple[params.AutoData, bool]:
    """The section as it is so far, and whether it is new: one that is there already stays as it is."""
    if not name:
        raise UserError("NAME must say what to call them: make data NAME=my_letters PATH=…")
    if not re.fullmatch(r"[a-z0-9_]{1,64}", name):
        raise UserError(f"NAME = {name!r} must be of a-z, 0-9 and _, at most 64 of them, such as NAME=my_letters")
    if params.parse_yaml(name, params.PARAMS) != name:
        raise UserError(f"NAME = {name!r} is no word for YAML; take one such as set_{name}")
    if not path:
        raise UserError(f"PATH must say where the images are: make data NAME={name} PATH=/home/me/letters")
    if path != path.encode(errors="replace").decode():
        raise UserError(f"PATH = {path!r} is no UTF-8 text; rename what is called so")
    if (source := _absolute(path)).is_file() and not _is_zip(source):
        raise UserError(f"PATH must be a folder or a zip; {source} is neither")
    known = params.load().data.get(name)
    asked = params.AutoData(reader="auto", path=path)
    if known is None:
        sources.refuse_outputs(name, asked)
        return asked, True
    if not isinstance(known, params.AutoData) or _absolute(known.path) != _absolute(path):
        raise UserError(f"{params.PARAMS} has a section data.{name} already, of other images; choose another NAME")
    return known, False


def _absolute(path: str) -> Path:
    return Path(sources.resolved({"path": path})["path"]).resolve()


def _is_zip(source: Path) -> bool:
    """Whether a file is a zip, or begins as one: it may be cut off, which is told when it is read."""
    with source.open("rb") as file:
        return file.read(2) == b"PK" or zipfile.is_zipfile(file)


def _read(folder: Path, section: params.AutoData, source: Path) -> Dataset:
    """The images that were fetched into a folder; errors name where they come from."""
    try:
        return readers.read(folder, section.model_dump())
    except UserError as error:
        raise UserError(str(error).replace(str(folder / archive.FILE), f"path = {source}")) from None


def _fitting(section: params.AutoData, looks: list[Look]) -> params.AutoData:
    """The section with size, invert and pad by what is seen."""
    return params.AutoData(
        reader="auto",
        path=section.path,
        size=auto.fitting_size(looks),
        invert=sum(look.paper < DARK for look in looks) > len(looks) / 2,
        pad=any(look.width != look.height for look in looks),
    )


def _counts(labels: Tensor, class_names: list[str]) -> list[int]:
    counts: list[int] = labels.bincount(minlength=len(class_names)).tolist()
    return counts


def _tell(facts: Iterator[tuple[str, str]]) -> None:
    for what, value in facts:
        print(f"  {what:<11} {_in_line(value)}")


def _in_line(text: str) -> str:
    """The text with what ends a line, or is no UTF-8, written as Python does."""
    return _UNPRINTED.sub(lambda found: ascii(found[0])[1:-1], text)


def _of_the_files(source: Path, layout: auto.Layout, looks: list[Look]) -> Iterator[tuple[str, str]]:
    """What there is: each fact with what it is of."""
    yield "layout", str(layout)
    yield "images", f"{len(layout.labels):,}"
    if layout.kind != auto.FLAT:
        yield "classes", classes(layout.class_names, _counts(torch.tensor(layout.labels), layout.class_names))
    if looks:
        smallest, largest = (f(looks, key=lambda look: look.width * look.height) for f in (min, max))
        of = f" (of {len(looks)} looked at)" * (len(looks) < len(layout.labels))
        ends = [f"{look.width} x {look.height}" for look in (smallest, largest)]
        sizes = " to ".join(dict.fromkeys(ends))
        yield "pixels", f"{sizes}, the longer side {auto.longer_side(looks)} in the median{of}"
    for reason, names in left_out(_names(source)).items():
        yield "left out", f"{len(names):,} × {reason}, such as {names[0]!r}"


def classes(names: list[str], counts: list[int]) -> str:
    """The classes with their counts, in order; many are folded.

    >>> classes(["a", "b"], [20, 20]), classes(["a", "b"], [20, 30])
    ("2: a, b; 20 images each", '2: a (20), b (30)')
    """
    more = f" and {len(names) - NAMED:,} more" * (len(names) > NAMED)
    if min(counts) == max(counts):
        return f"{len(names):,}: {', '.join(names[:NAMED])}{more}; {counts[0]:,} image{'s' * (counts[0] != 1)} each"
    shown = ", ".join(f"{name} ({count:,})" for name, count in zip(names[:NAMED], counts, strict=False))
    fewest, largest = (f(zip(counts, names, strict=True)) for f in (min, max))
    span = f"; {fewest[0]:,} ({fewest[1]}) to {largest[0]:,} ({largest[1]}) images each" * bool(more)
    return f"{len(names):,}: {shown}{more}{span}"


def _names(source: Path) -> list[str]:
    """The files at a path, in a folder or an archive."""
    if source.is_dir():
        return sorted(str(Path(folder, file).relative_to(source)) for folder, _, files in os.walk(source) for file in files)
    with zips.opened(source, str(source)) as opened:
        return sorted(name for info in opened.infolist() if (name := zips.plain_name(info, str(source)))[-1] != "/")


def left_out(names: list[str]) -> dict[str, list[str]]:
    """The files that are not looked at, by reason."""
    found: dict[str, list[str]] = {}
    for name in names:
        if any(map(zips.is_hidden, name.split("/"))):
            found.setdefault("hidden, or left by a system", []).append(name)
        elif not zips.is_image(name):
            kind = Path(name).suffix.lower()
            found.setdefault(f"no {' '.join(zips.SUFFIXES)} but {kind or 'without a suffix'}", []).append(name)
    return found


def _of_the_images(found: Dataset) -> Iterator[tuple[str, str]]:
    for reason, count in found.report["dropped"].items():
        named = [line.removesuffix(f": {reason}") for line in found.report["dropped_files"] if line.endswith(f": {reason}")]
        yield "left out", f"{count:,} × {reason}" + f", such as {named[0]!r}" * bool(named)
    yield "equal", f"{found.report['duplicates']:,} equal to another image"
    train, validation, test = (len(y) for _, y in found.splits.values())
    yield "splits", f"{train:,} to train on, {validation:,} to validate on, {test:,} to test on"


def _choices(section: params.AutoData, size: int, looks: list[Look]) -> Iterator[tuple[str, str]]:
    """What the pictures are brought to, and why."""
    dark, flat = sum(look.paper < DARK for look in looks), sum(look.width != look.height for look in looks)
    most, of = max(dark, len(looks) - dark), f"of {len(looks):,}"
    mixed = f"; {len(looks) - most:,} {of} have the other background and will stand out; sort them"
    yield "background", f"{'dark' if dark * 2 > len(looks) else 'light'} in {most:,} {of}" + mixed * (most < auto.MOST * len(looks))
    yield "size", f"{size} x {size}" + f", of {', '.join(map(str, auto.SIZES))} the nearest" * (size == auto.fitting_size(looks))
    yield "invert", f"{section.invert}".lower() + ": dark and light change places, so that paper is light" * section.invert
    how = "keep their proportions, on their own background" if section.pad else "are stretched"
    yield (
        "pad",
        f"{section.pad}".lower() + (f": {flat:,} {of} are not square; they {how}" if flat else ": all are square"),
    )


def contact_sheet(images: Tensor, labels: Tensor, class_names: list[str]) -> grids.Pixels:
    """EXAMPLES of each of the first ON_SHEET classes in a row behind its name; without classes as many rows of what there is.

    Args:
        images: (N, 1, H, W) uint8. labels: (N,) int64.
    """
    if len(class_names) == 1:
        images = images[torch.linspace(0, len(images) - 1, min(EXAMPLES**2, len(images))).long()]
        labels, class_names = torch.arange(len(images)) // EXAMPLES, [""] * -(-len(images) // EXAMPLES)
    scale = max(1, -(-SHOWN // images.shape[-1]))
    font = ImageFont.truetype(_font(), 18)
    names = [name if len(name) <= LONGEST else f"{name[:LONGEST]}…" for name in map(_in_line, class_names[:ON_SHEET])]
    left = 12 + round(max(map(font.getlength, names)))
    rows = []
    for y, name in enumerate(names):
        picked = images[(labels == y).nonzero()[:EXAMPLES, 0]]
        row = torch.full((EXAMPLES, *images.shape[1:]), 128, dtype=torch.uint8)
        row[: len(picked)] = picked
        pixels = grids.grid(row.numpy(), EXAMPLES, scale=scale)
        canvas = Image.new("L", (left + pixels.shape[1], len(pixels)), 255)
        canvas.paste(Image.fromarray(pixels), (left, 0))
        ImageDraw.Draw(canvas).text((left - 6, len(pixels) / 2), name, fill=0, font=font, anchor="rm")
        rows.append(np.asarray(canvas))
    deep = max(1, TALLEST // len(rows[0]))  # rows in a column
    rows += [np.full_like(rows[0], 255)] * (-len(rows) % min(deep, len(rows)))
    return np.hstack([np.vstack(rows[i : i + deep]) for i in range(0, len(rows), deep)])


def _font() -> str:
    """A font of most alphabets: it comes with matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")


def _write(name: str, section: params.AutoData, is_new: bool) -> None:
    """Write params.yaml with the section, and say what to type next."""
    values = {key: getattr(section, key) for key in ("reader", "path", "size", "invert", "pad")}
    before, text = params.PARAMS.read_bytes().decode("utf-8-sig"), params.with_dataset(name, values)
    if text == before:
        print(f"{params.PARAMS} names it already: nothing to do.")
    else:
        was_committed = params.is_committed()
        params.write(text)
        print(f"{params.PARAMS} now has data.{name}, and sweep.datasets names it.")
        if was_committed:
            print(f"`git diff {params.PARAMS}` shows it, `git checkout {params.PARAMS}` undoes it.")
        else:  # a checkout would take back more
            print(f"To undo it, remove {f'data.{name} and ' * is_new}the name in sweep.datasets.")
    print(f"Next: make repro CELL={next_cell(params.load().sweep, name)}")


def next_cell(sweep: params.Sweep, dataset: str) -> params.Cell:
    """The cell of a dataset to try first: of schedule cosine where it is swept, the T in the middle."""
    schedule = "cosine" if "cosine" in sweep.schedules else sweep.schedules[0]
    return params.Cell(dataset, schedule, sorted(sweep.timesteps)[len(sweep.timesteps) // 2], sweep.seeds[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.pipeline.own_data", description=__doc__)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("path", metavar="PATH")
    args = parser.parse_args()
    with in_one_line("data"):
        main(args.name, args.path)
