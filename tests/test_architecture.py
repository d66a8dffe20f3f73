"""The rooms of the house and the stage graph: who may import whom, and what dvc.yaml says against what the code does."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.pipeline import params, paths

ROOT = Path(__file__).parents[1]
SCIENCE = ("diffusion", "networks", "datasets", "fidelity")
TRAINING_KNOWS = ("stages.diffusion", "stages.networks", "stages.datasets.images", "stages.training")
MLFLOW = {"stages/pipeline/tracking.py", "stages/pipeline/store.py"}
YAML_READERS = {"ruamel", "yaml"}
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "stages").rglob("*.py"))}
GRAPH = params.read_yaml(ROOT / "dvc.yaml")["stages"]


def imports(source: str, path: str = "") -> set[str]:
    """Dotted names that a source imports, anywhere in it; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: str) -> str:
    """The folder of stages/ that a file lies in; empty for a stage."""
    return path.removeprefix("stages/").rpartition("/")[0]


def wrong_imports(sources: dict[str, str]) -> Iterator[str]:
    """Every import that goes up or sideways, as `path imports name`."""
    for path, source in sources.items():
        for name in imports(source, path):
            parts = name.split(".")
            inside = parts[1] if parts[0] == "stages" and len(parts) > 1 else ""
            wrong = {
                "a stage is imported by nobody": parts[0] == "stages" and f"stages/{inside}.py" in sources,
                "science imports its own room only": room(path) in SCIENCE
                and inside in {"pipeline", "training", *SCIENCE} - {room(path)},
                "training imports the science that it needs": room(path) == "training"
                and parts[0] == "stages"
                and not name.startswith(tuple(f"{known}." for known in TRAINING_KNOWS)),
                "stages alone import training": inside == "training" and room(path) not in ("", "training"),
                "tracking and its store alone import mlflow": parts[0] == "mlflow" and path not in MLFLOW,
                "params alone reads YAML": parts[0] in YAML_READERS and path != "stages/pipeline/params.py",
                "only what runs stages knows DVC": parts[0] == "dvc",
            }
            yield from (f"{path} imports {name}: {rule}" for rule, broken in wrong.items() if broken)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("stages/diffusion/x.py", "from stages.pipeline import paths"),
        ("stages/diffusion/x.py", "def f():\n    import stages.networks.unet"),
        ("stages/pipeline/x.py", "from stages.train import main"),
        ("stages/pipeline/x.py", "import mlflow.entities"),
        ("stages/networks/x.py", "from stages.training.state import State"),
        ("stages/pipeline/x.py", "from stages.training import step"),
        ("stages/training/x.py", "from stages.pipeline import paths"),
        ("stages/training/x.py", "from stages.fidelity.frechet import Gaussian"),
        ("stages/training/x.py", "from stages.datasets.readers import read"),
        ("stages/compare.py", "from ruamel.yaml import YAML"),
        ("stages/pipeline/x.py", "import dvc.api"),
    ],
)
def test_imports_go_down_only(path: str, source: str) -> None:
    assert not list(wrong_imports(SOURCES))
    assert list(wrong_imports(SOURCES | {path: source}))  # the check can fail


def code_of(name: str, sources: dict[str, str]) -> str | None:
    """The file of the module that a dotted name is, or lies in."""
    path = name.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path.rpartition('/')[0]}.py") if file in sources), None)


def closure(stage: str, sources: dict[str, str]) -> set[str]:
    """The files that can change a stage's result: its own, and the science and training it imports, directly or by the loaders.

    pipeline/ is plumbing, so what it imports does not count, but for the networks that functions of checkpoint.py build.
    """
    start = f"stages/{stage}.py"
    found, waiting = {start}, [*imports(sources[start]), *built_by_loaders(sources[start], sources)]
    while waiting:
        file = code_of(waiting.pop(), sources)
        if file and file not in found and room(file) in (*SCIENCE, "training"):
            found.add(file)
            waiting += imports(sources[file])
    return found


def built_by_loaders(source: str, sources: dict[str, str]) -> Iterator[str]:
    """Dotted names of the science that those functions of checkpoint.py use which a source names."""
    loaders = sources["stages/pipeline/checkpoint.py"]
    known = {name.rpartition(".")[2]: name for name in imports(loaders)}
    named = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    named |= {name.rpartition(".")[2] for name in imports(source)}
    for function in ast.parse(loaders).body:
        if isinstance(function, ast.FunctionDef) and function.name in named:
            yield from (known[node.id] for node in ast.walk(function) if isinstance(node, ast.Name) and node.id in known)


@pytest.mark.parametrize("stage", GRAPH)
def test_code_deps_are_the_import_closure(stage: str) -> None:
    listed = [dep for dep in GRAPH[stage]["deps"] if dep.endswith(".py")]
    assert len(listed) == len(set(listed))
    assert set(listed) == closure(stage, SOURCES)


def test_closure_follows_science_but_not_plumbing() -> None:
    sources = {
        "stages/a.py": "from stages.networks.n import f\nfrom stages.training import step\n"
        "from stages.pipeline import checkpoint, plot\ncheckpoint.load()",
        "stages/training/step.py": "from stages.networks import moved",
        "stages/networks/moved.py": "",
        "stages/networks/n.py": "from stages.networks import deep",
        "stages/networks/deep.py": "",
        "stages/networks/loaded.py": "",
        "stages/networks/unused.py": "",
        "stages/pipeline/plot.py": "from stages.diffusion import s",
        "stages/diffusion/s.py": "",
        "stages/pipeline/checkpoint.py": "from stages.networks.loaded import L\nfrom stages.networks.unused import U\n"
        "def load():\n    return L()\ndef other():\n    return U()",
    }
    expected = {"stages/a.py", "stages/training/step.py"} | {f"stages/networks/{n}.py" for n in ("n", "deep", "loaded", "moved")}
    assert closure("a", sources) == expected


def declared(source: str) -> set[str]:
    """The entries of `params:` that a stage's main asks for, by the names of its arguments; `runtime` cannot change a result."""
    main = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    names = [argument.arg for argument in main.args.args if argument.arg not in ("dataset", "cell", "runtime")]
    return {"data.${item.dataset}" if name == "data" else name.replace("__", ".") for name in names}


@pytest.mark.parametrize("stage", GRAPH)
def test_params_are_those_that_main_asks_for(stage: str) -> None:
    assert set(GRAPH[stage]["params"]) == declared(SOURCES[f"stages/{stage}.py"])


def test_declared_params_follow_the_signature() -> None:
    assert declared("def main(cell: C, data: D, sample__images: int): ...") == {"data.${item.dataset}", "sample.images"}


def promised(stage: str) -> set[str]:
    """The outputs of a stage by pipeline/paths.py."""
    name = "${key}" if "schedule" in GRAPH[stage].get("matrix", {}) else "${item.dataset}"

    def files(folder: Callable[[str], Path], *names: str) -> set[str]:
        return {str(folder(name) / file) for file in names}

    made = {
        "fetch": {str(paths.raw(name))},
        "prepare": files(paths.prepared, "train.safetensors", "test.safetensors", "dataset.json")
        | files(paths.data_figures, "noising.png", "samples.png"),
        "extractor": {str(paths.extractor(name)), str(paths.scores(stage, name))},
        "reference": {str(paths.reference(name)), str(paths.scores(stage, name))},
        "train": files(paths.weights, "previews.zip", *(f"{n}.safetensors" for n in ("ema-25", "ema-50", "ema-75", "ema", "raw")))
        | {str(paths.loss_curve(name))},
        "sample": files(
            paths.samples,
            "fast.safetensors",
            "ancestral.safetensors",
            "snapshots.safetensors",
            "chain.png",
            "grid.png",
            "denoising.gif",
        ),
        "evaluate": {str(paths.scores(stage, name))},
    }
    return made[stage] | {str(paths.timing(stage, name))}


@pytest.mark.parametrize("stage", [stage for stage in GRAPH if stage != "compare"])
def test_outs_are_where_paths_says(stage: str) -> None:
    assert set(paths.outs(GRAPH[stage])) == promised(stage)


def test_every_out_is_a_file_and_no_command_holds_a_parameter() -> None:
    """DVC deletes a folder whole, with what others put there; and a shell reads a command."""
    for name, stage in GRAPH.items():
        assert stage["cmd"] == f"python -m stages.{name}"
        assert all(Path(out).suffix for out in set(paths.outs(stage))), name
        uncached = [out for out in stage.get("outs", []) if isinstance(out, dict)]
        assert not uncached, "a stage with such an output is never restored from the run cache"


def test_data_deps_are_made_by_an_earlier_stage() -> None:
    made: set[str] = set()
    for stage in GRAPH.values():
        for dep in stage["deps"]:
            if not dep.endswith(".py"):
                assert any(f"{dep}/".startswith(f"{out}/") or f"{out}/".startswith(f"{dep}/") for out in made), dep
        made |= set(paths.outs(stage))


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import stages.compare", "torch"),
        ("import stages.pipeline.plan", "torch"),
        ("import stages.pipeline.tracking", "mlflow"),
        ("import stages.evaluate", "matplotlib"),
        ("from stages import train; train._set_kernels(deterministic=False)", "torch._inductor"),
    ],
)
def test_starts_without_what_is_slow_to_import_and_not_needed(statement: str, heavy: str) -> None:
    code = f"import sys; {statement}; print({heavy!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
