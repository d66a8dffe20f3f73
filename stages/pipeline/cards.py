"""A card for each prepared dataset, in data/README.md: where it comes from, how much of it there is, how it looks.

python -m stages.pipeline.cards            `make cards`
"""

from pathlib import Path
from typing import Any

from PIL import Image

from stages.errors import in_one_line
from stages.pipeline import paths
from stages.pipeline.files import read_json, whole_file

PAGE, PICTURES = Path("data/README.md"), Path("docs/data")
MARK = "<!-- What follows is written by `make cards`. -->\n"
WIDEST = 700  # pixels of a picture: it is in git
SHORT = 12  # classes, or raw files, that a card shows without being asked


def main() -> None:
    """Write the cards of all datasets that are prepared here behind the mark; those of others stay as they are."""
    page = PAGE.read_text(encoding="utf-8")
    head, _, tail = page.partition(MARK)
    cards = {text.partition("\n")[0].removeprefix("## "): text for text in (f"## {part}" for part in tail.split("\n## ")[1:])}
    for file in sorted(paths.prepared("x").parent.glob("*/dataset.json")):
        name, about = file.parent.name, read_json(file)
        if "validation" not in about["images"]:
            print(f"{name}: prepared by an earlier version, in two splits; its card stays until `dvc repro prepare@{name}`")
            continue
        picture = PICTURES / f"{name}.png"
        with whole_file(picture) as temporary, Image.open(paths.data_figures(name) / "samples.png") as image:
            image.thumbnail((WIDEST, image.height))
            image.save(temporary, optimize=True)
        cards[name] = card(name, about, picture)
        print(f"{name}: {PAGE}, {picture}")
    text = "\n\n".join(cards[name].strip() for name in sorted(cards))
    with whole_file(PAGE) as temporary:
        temporary.write_text(f"{head}{MARK}\n{text}\n", encoding="utf-8")


def card(name: str, about: dict[str, Any], picture: Path) -> str:
    """Markdown of one dataset, from its dataset.json."""
    counts = about["images_per_class"]
    n, near, classes, how = about["images"], about["nearly_equal"], about["class_names"], about["split"]
    if isinstance(how, dict):
        shares = f"{how['validation_share']:.0%} to validate on, {how['test_share']:.0%} to test on"
        how = f"by a hash of their {how['by']}, {shares}, seed {how['seed']}"
    dropped = "; ".join(f"{count:,} × {reason}" for reason, count in about["dropped"].items()) or "none"
    smallest, largest = (f(zip(counts["train"], classes, strict=True)) for f in (min, max))
    facts = {
        "images": f"{n['train']:,} to train on + {n['validation']:,} to validate on + {n['test']:,} to test on, "
        f"{about['size']} × {about['size']} pixels",
        "written by": "a program: synthetic" if about["synthetic"] else "people",
        "licence": about["licence"],
        **({"taken for": about["layout"]} if "layout" in about else {}),
        "split": how,
        "dropped": dropped,
        "equal to another image": f"{about['duplicates']:,}",
        "nearly equal to one of another split": f"{near['validation']:,} to validate on, {near['test']:,} to test on",
        "classes": f"{len(classes)}; in train from {smallest[0]:,} ({smallest[1]}) to {largest[0]:,} ({largest[1]})",
        "pixels": f"mean {about['pixel_mean']:.3f}, standard deviation {about['pixel_std']:.3f} in [-1, 1]",
    }
    rows = zip(classes, *(counts[split] for split in n), strict=True)
    balance = [f"| {y} | {' | '.join(f'{count:,}' for count in of_class)} |" for y, *of_class in rows]
    files = [f"| {file} | `{digest}` |" for file, digest in about["source_sha256"].items()]
    return "\n".join(
        [
            f"## {name}\n\n![Ten images of each class]({Path('..') / picture})\n",
            "| | |\n|---|---|",
            *(f"| {what} | {value} |" for what, value in facts.items()),
            "",
            *_folded("Images of each class", [f"| class | {' | '.join(n)} |", "|---|---|---|---|", *balance], len(classes)),
            *_folded("Raw files", ["| file | SHA-256 |", "|---|---|", *files], len(files)),
        ]
    )


def _folded(title: str, table: list[str], length: int) -> list[str]:
    """A table under a title, which has to be opened first where it is long."""
    if length <= SHORT:
        return [f"{title}:\n", *table, ""]
    return [f"<details><summary>{title}</summary>\n", *table, "\n</details>\n"]


if __name__ == "__main__":
    with in_one_line("cards"):
        main()
