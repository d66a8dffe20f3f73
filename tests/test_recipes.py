"""What the README tells to do to add something leaves `make test` green."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.kills import copy_tree

ROOT = Path(__file__).parents[1]
METRIC = """\
\"\"\"How bright are the samples?\"\"\"

from stages.fidelity.sets import Fake, Real


def brightness(real: Real, fake: Fake) -> tuple[float, float]:
    \"\"\"Mean of the first feature, with no error told.\"\"\"
    return float(fake.features[:, 0].mean() - real.features[:, 0].mean()), 0.0
"""
SPACING = """\
def halved(alpha_bar: Tensor, steps: int) -> Tensor:
    \"\"\"As `trailing`.\"\"\"
    return trailing(alpha_bar, steps)


"""
SUITES = ("test_architecture.py", "test_docs.py", "diffusion", "fidelity", "pipeline/test_params.py")


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert before in text, file
    file.write_text(text.replace(before, after), encoding="utf-8")


def a_row(tree: Path, folder: str, like: str) -> None:
    row = f"| [`mine`](../stages/diffusion/{folder}/mine.py) | as `{like}` | none |"
    edit(tree / "docs/ddpm.md", f"| [`{like}`](", f"{row}\n| [`{like}`](")


def a_schedule(tree: Path) -> None:
    cosine = tree / "stages/diffusion/schedules/cosine.py"
    cosine.with_name("mine.py").write_text(cosine.read_text())
    a_row(tree, "schedules", "cosine")


def a_sampler(tree: Path) -> None:
    ddim = tree / "stages/diffusion/samplers/ddim.py"
    ddim.with_name("mine.py").write_text(ddim.read_text())
    a_row(tree, "samplers", "ddim")


def a_spacing(tree: Path) -> None:
    spacings = tree / "stages/diffusion/spacings.py"
    edit(spacings, "def linspace(", f"{SPACING}def linspace(")
    edit(spacings, '    "trailing": trailing,\n', '    "trailing": trailing,\n    "halved": halved,\n')
    edit(tree / "stages/pipeline/params/schema.py", '"trailing", "leading"', '"trailing", "halved", "leading"')


def a_metric(tree: Path) -> None:
    (tree / "stages/fidelity/brightness.py").write_text(METRIC)
    metrics, before = tree / "stages/fidelity/metrics.py", "from stages.fidelity.class_tv"
    edit(metrics, "METRICS = {\n", 'METRICS = {\n    "brightness": Metric(brightness),\n')
    edit(metrics, before, f"from stages.fidelity.brightness import brightness\n{before}")
    dep = "      - stages/fidelity/class_tv.py\n"
    edit(tree / "dvc.yaml", dep, dep.replace("class_tv", "brightness") + dep)


@pytest.mark.slow
@pytest.mark.parametrize("added", [a_schedule, a_sampler, a_spacing, a_metric])
def test_a_recipe_of_the_readme_breaks_no_test(added: Callable[[Path], None], tmp_path: Path) -> None:
    copy_tree(tmp_path, "{}")
    shutil.copytree(ROOT / "metrics", tmp_path / "metrics")  # the README links to its report
    added(tmp_path)
    command = [sys.executable, "-m", "pytest", "-x", *(f"tests/{name}" for name in SUITES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
