import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.diffusion import by_name
from stages.pipeline import params

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[(`?)([^\]`]+)`?\]\(([^)#\s]+)\)")
TO_HEADING = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")
PAGES = [ROOT / "README.md", *sorted(page for top in ("benchmarks", "data", "docs") for page in (ROOT / top).rglob("*.md"))]


def links(page):
    return [(name, target, bool(code)) for code, name, target in LINK.findall(page.read_text()) if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for name, target, code in links(page):
        path = page.parent / target
        assert path.exists(), f"{page.name} links to {target}"
        if code and path.suffix == ".py" and not name.endswith(".py"):
            defined = re.search(rf"^(def|class) {re.escape(name)}\b", path.read_text(), re.MULTILINE)
            assert defined or name == path.stem, f"{target} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_heading_finds_it(page):
    for target, anchor in TO_HEADING.findall(page.read_text()):
        there = page.parent / target if target else page
        headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{page.name} links to {target}#{anchor}"


def test_the_student_page_links_every_schedule_and_sampler():
    linked = {target for _, target, _ in links(ROOT / "docs" / "ddpm.md")}
    for folder in ("schedules", "samplers"):
        assert {f"../stages/diffusion/{folder}/{name}.py" for name in by_name.names(folder)} <= linked


def test_the_section_for_ones_own_images_is_valid_and_short() -> None:
    page = (ROOT / "docs/own-images.md").read_text(encoding="utf-8")
    block = next(text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "reader: auto" in text)
    values = params.read_yaml(ROOT / "params.yaml")
    values["data"] |= YAML(typ="safe", pure=True).load(block)["data"]
    values["sweep"]["datasets"] = ["my_letters"]
    assert params.Params.model_validate(values).data["my_letters"].reader == "auto"
    assert len(block.splitlines()) <= 1 + 5


def test_the_readme_is_read_in_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500
