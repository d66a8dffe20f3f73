import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[(`?)([^\]`]+)`?\]\(([^)#\s]+)\)")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def links(page):
    return [(name, target, bool(code)) for code, name, target in LINK.findall(page.read_text()) if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for name, target, code in links(page):
        path = page.parent / target
        assert path.exists(), f"{page.name} links to {target}"
        if code and path.suffix == ".py" and not name.endswith(".py"):
            assert re.search(rf"^def {re.escape(name)}\(", path.read_text(), re.MULTILINE), f"{target} has no function {name}"


def test_the_student_page_links_every_schedule_and_sampler():
    from stages.diffusion.samplers import SAMPLERS
    from stages.diffusion.schedules import SCHEDULES

    linked = {name for name, _, _ in links(ROOT / "docs" / "ddpm.md")}
    assert {*SCHEDULES, *SAMPLERS} <= linked
