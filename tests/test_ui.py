"""What a person sees: `make ui` in a browser, on a real store. Needs a Chromium that is on the PATH."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from benchmarks import kills
from stages.tracking import mlflow_forms

pytestmark = pytest.mark.browser
PATIENCE = 60_000  # ms


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the UI over two real cells."""
    tree = kills.Pipeline(tmp_path_factory.mktemp("ui") / "naqsh").folder
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "stages.tracking", "ui", "--port", str(port)]
    with subprocess.Popen(command, cwd=tree, env=kills.environment(), start_new_session=True) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            while server.poll() is None:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def page(ui: str) -> Iterator[Page]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.goto(f"{ui}/#/experiments/1/runs")
        page.get_by_role("button", name="Close").first.click()  # of the assistant
        yield page
        browser.close()


@pytest.fixture
def screenshots(page: Page, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Keep what was seen in NAQSH_SCREENSHOTS, where that is set."""
    yield
    page.screenshot(path=Path(os.environ.get("NAQSH_SCREENSHOTS", tmp_path)) / f"{request.node.name}.png")


@pytest.mark.usefixtures("screenshots")
def test_runs_table_lists_the_cells(page: Page) -> None:
    for cell in kills.CELLS:
        page.get_by_text(cell, exact=True).first.wait_for()


@pytest.mark.usefixtures("screenshots")
def test_charts_compare_the_cells(page: Page, ui: str) -> None:
    page.goto(f"{ui}/#/experiments/1/runs?compareRunsMode=CHART")
    page.get_by_placeholder("Search metric charts").fill("loss|^fid")
    for name in ("fid", "train_loss"):
        page.get_by_text(name, exact=True).first.wait_for()


@pytest.mark.usefixtures("screenshots")
def test_a_run_shows_its_previews_by_report(page: Page, ui: str) -> None:
    page.goto(f"{ui}/#/experiments/1/runs")
    page.get_by_text(kills.CELL, exact=True).first.click()
    page.get_by_role("tab", name="Model metrics").or_(page.get_by_text("Model metrics", exact=True)).first.click()
    page.get_by_placeholder("Search metric charts").fill("preview")
    page.get_by_text("preview", exact=True).first.wait_for()
    page.locator("img[src*='preview']").or_(page.locator("[role=slider]")).first.wait_for()


@pytest.mark.usefixtures("screenshots")
def test_the_link_of_make_ui_shows_scores_pictures_and_losses_side_by_side(page: Page, ui: str) -> None:
    page.goto(f"{ui}/#/experiments/1/runs?compareRunsMode=CHART&{mlflow_forms.LINK}")
    for name in ("scores", "pictures", "training"):
        page.get_by_text(name).first.wait_for()
    pictures = page.locator("img[src*='preview%2Bstep%2B8%2B']")  # of the last report
    pictures.first.wait_for()
    pictures.nth(1).wait_for()
    slider = page.get_by_role("slider").first
    slider.focus()
    slider.press("ArrowLeft")
    page.locator("img[src*='preview%2Bstep%2B7%2B']").nth(1).wait_for()
