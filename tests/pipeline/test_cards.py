"""The cards of data/README.md: of what is prepared, the rest of the page and the cards of other datasets left alone."""

from pathlib import Path

import pytest
from PIL import Image

from stages.pipeline import cards, paths
from stages.pipeline.files import write_json

ABOUT = {
    "reader": "folder",
    "synthetic": False,
    "licence": "mine",
    "source_sha256": {"images.zip": "ab" * 32},
    "size": 8,
    "class_names": ["a", "۰"],
    "images": {"train": 1030, "validation": 11, "test": 7},
    "images_per_class": {"train": [30, 1000], "validation": [5, 6], "test": [3, 4]},
    "pixel_mean": 0.25,
    "pixel_std": 0.5,
    "split": {"by": "pixels", "validation_share": 0.1, "test_share": 0.2, "seed": 0},
    "dropped": {"cut off": 3},
    "duplicates": 5,
    "nearly_equal": {"validation": 2, "test": 1},
}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cards.PAGE.parent.mkdir()
    cards.PAGE.write_text(f"# Data\n\nBy hand.\n\n{cards.MARK}\n## other\n\nkept\n\n## zoo\n\nkept too\n", encoding="utf-8")


def prepare(name: str, **changes: object) -> None:
    write_json(paths.prepared(name) / "dataset.json", ABOUT | changes)
    paths.data_figures(name).mkdir(parents=True)
    Image.new("L", (1400, 60), 128).save(paths.data_figures(name) / "samples.png")


def test_a_card_says_what_is_known_and_shows_it() -> None:
    prepare("mine")
    cards.main()
    page = cards.PAGE.read_text(encoding="utf-8")
    assert page.startswith(f"# Data\n\nBy hand.\n\n{cards.MARK}\n## mine\n")
    for words in (
        "1,030 to train on + 11 to validate on + 7 to test on, 8 × 8 pixels",
        "| written by | people |",
        "by a hash of their pixels, 10% to validate on, 20% to test on, seed 0",
        "| nearly equal to one of another split | 2 to validate on, 1 to test on |",
        "3 × cut off",
        "from 30 (a) to 1,000 (۰)",
        "| class | train | validation | test |",
        "| ۰ | 1,000 | 6 | 4 |",
        "ab" * 32,
        "![Ten images of each class](../docs/data/mine.png)",
    ):
        assert words in page
    assert "taken for" not in page
    with Image.open(cards.PICTURES / "mine.png") as picture:
        assert picture.size == (700, 30)


def test_cards_come_in_order_and_those_of_other_datasets_stay() -> None:
    prepare("two")
    prepare("mine")
    cards.main()
    before = cards.PAGE.read_text(encoding="utf-8")
    assert [line for line in before.splitlines() if line.startswith("## ")] == ["## mine", "## other", "## two", "## zoo"]
    assert "kept\n" in before
    assert before.endswith("kept too\n")
    cards.main()
    assert cards.PAGE.read_text(encoding="utf-8") == before


def test_what_an_earlier_version_prepared_keeps_its_card(capsys: pytest.CaptureFixture[str]) -> None:
    prepare("zoo", images={"train": 1030, "test": 7})
    before = cards.PAGE.read_text(encoding="utf-8")
    cards.main()
    assert cards.PAGE.read_text(encoding="utf-8") == before
    assert "zoo: prepared by an earlier version" in capsys.readouterr().out


def test_a_long_table_is_folded_and_a_published_split_named() -> None:
    counts = list(range(100, 140))
    prepare(
        "mine",
        class_names=list(map(str, counts)),
        images_per_class=dict.fromkeys(ABOUT["images"], counts),
        split="published",
        layout="no labels",
    )
    cards.main()
    page = cards.PAGE.read_text(encoding="utf-8")
    assert "<details><summary>Images of each class</summary>" in page
    assert "| split | published |" in page
    assert "| taken for | no labels |" in page
