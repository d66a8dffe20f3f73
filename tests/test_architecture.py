"""The rooms of the house and the stage graph: who may import whom, and what dvc.yaml says against what the code does."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from stages.diffusion import by_name
from stages.pipeline import graph, params, paths
from stages.pipeline.stage import SUBJECTS

ROOT = Path(__file__).parents[1]
KNOWS = {  # which rooms a room imports, beside itself; "" are the stages
    "errors": (),
    "diffusion": ("errors",),
    "networks": ("errors",),
    "datasets": ("errors",),
    "fidelity": ("errors",),
    "training": ("diffusion", "networks", "datasets", "errors"),
    "drawing": ("diffusion", "networks", "datasets", "errors"),
    "pipeline": ("diffusion", "networks", "datasets", "fidelity", "drawing", "errors"),
    "tracking": ("diffusion", "pipeline", "errors"),
    "sweep": ("tracking", "pipeline", "drawing", "errors"),
    "": ("diffusion", "networks", "datasets", "fidelity", "training", "drawing", "pipeline", "tracking", "errors"),
}
SCIENCE = ("diffusion", "networks", "datasets", "fidelity", "training", "drawing")
START = "stages/__init__.py"  # what every program begins with: it knows who listens to stages, and what they began with
YAML_READERS = {"ruamel", "yaml"}
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "stages").rglob("*.py"))}
GRAPH = graph.in_order(params.read_yaml(ROOT / "dvc.yaml")["stages"])
CHOICES = {  # what stands for a choice in dvc.yaml: the names that may be chosen
    "${item.schedule}": by_name.names("schedules"),
    "${sample.fast.sampler}": by_name.names("samplers"),
    "${sample.ancestral.sampler}": ["ddpm"],
}
NETWORK = "${item.dataset}-${item.schedule}-${item.seed}"  # the key of `train`, as a cell names it
NAMED = [path for path in SOURCES if re.fullmatch(r"stages/diffusion/(schedules|samplers)/[^_]\w*\.py", path)]
# What decides results, though it lies among the plumbing: how images are laid out, how plots are drawn, what a row holds.
DECIDING = {"stages/pipeline/grids.py", "stages/pipeline/figures.py", "stages/tracking/results.py"}
# What decides none, though it lies in a room that does: it reads what is there, or refuses.
READING = "stages/drawing/weights.py"
DEFAULTS = {"prepare": {"stages/pipeline/params/data.py"}}  # of options that decide pixels, where params.yaml does not say them
# Previews are a glance at a training. How they are laid out, and by which sampler they are drawn, never trains a model again.
GLANCED_AT = {"train": {"stages/pipeline/grids.py"}}


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
    """The folder of stages/ that a file lies in, at any depth; empty for a stage."""
    return path.removeprefix("stages/").rpartition("/")[0].partition("/")[0]


def wrong_imports(sources: dict[str, str]) -> Iterator[str]:
    """Every import that goes up or sideways, or into what is private, as `path imports name`."""
    for path, source in sources.items():
        for name in imports(source, path):
            parts = name.split(".")
            ours = parts[0] == "stages"
            inside = parts[1] if ours and len(parts) > 1 else ""
            wrong = {
                "a stage is imported by nobody": ours and f"stages/{inside}.py" in SOURCES,
                "rooms know those below them": ours and path != START and inside not in (*KNOWS[room(path)], room(path)),
                "names that begin with an underscore are private": ours and any(re.match(r"_[^_]", part) for part in parts),
                "tracking alone imports mlflow": parts[0] == "mlflow" and room(path) != "tracking",
                "params alone reads YAML": parts[0] in YAML_READERS and path != "stages/pipeline/params/yaml_files.py",
                "only what runs stages knows DVC": parts[0] == "dvc",
                "a schedule or a sampler knows no other": path in NAMED and f"{'/'.join(parts[:4])}.py" in NAMED,
                "schedules do without torch": "/schedules/" in path and parts[0] == "torch",
                "comparing does without torch": path == "stages/compare.py" and parts[0] == "torch",
            }
            yield from (f"{path} imports {name}: {rule}" for rule, broken in wrong.items() if broken)
        for reached in private_attributes(source):
            yield f"{path} reaches for {reached}, which is private"


def private_attributes(source: str) -> Iterator[str]:
    """What a source takes from inside a module of the project, as `module._name`."""
    tree = ast.parse(source)
    modules = {
        alias.asname or alias.name.rpartition(".")[2]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stages")
        for alias in node.names
        if alias.name.islower()
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and ast.unparse(node.value) in modules:
            yield ast.unparse(node)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("stages/diffusion/x.py", "from stages.pipeline import paths"),
        ("stages/diffusion/x.py", "def f():\n    import stages.networks.unet"),
        ("stages/pipeline/x.py", "from stages.train import main"),
        ("stages/pipeline/x.py", "import mlflow.entities"),
        ("stages/pipeline/x.py", "def f():\n    from stages.tracking import mirror"),
        ("stages/tracking/x.py", "from stages.sweep import plan"),
        ("stages/drawing/x.py", "from stages.pipeline import paths"),
        ("stages/errors/x.py", "from stages.pipeline import paths"),
        ("stages/train.py", "from stages.sweep import plan"),
        ("stages/pipeline/x.py", "from stages.pipeline.files import _refuse"),
        ("stages/pipeline/x.py", "from stages.pipeline import files\nfiles._refuse()"),
        ("stages/compare.py", "from ruamel.yaml import YAML"),
        ("stages/pipeline/x.py", "import dvc.api"),
        ("stages/diffusion/schedules/cosine.py", "from stages.networks.unet import UNet"),
        ("stages/diffusion/schedules/cosine.py", "from stages.diffusion.schedules import _of_size"),
        ("stages/diffusion/schedules/cosine.py", "import torch"),
        ("stages/diffusion/samplers/ddim.py", "from stages.diffusion.samplers.ddpm import sample"),
    ],
)
def test_a_wrong_import_is_seen(path: str, source: str) -> None:
    assert list(wrong_imports({path: source}))


def test_imports_go_down_only() -> None:
    assert not list(wrong_imports(SOURCES))


def circle(sources: dict[str, str]) -> list[str]:
    """Files that import each other in a circle, the first again at the end; empty where there is none."""
    edges = {
        path: {file for name in imports(source, path) if (file := module_of(name, sources)) not in (None, path)}
        for path, source in sources.items()
    }
    done: set[str] = set()

    def walk(path: str, above: tuple[str, ...]) -> list[str]:
        if path in above:
            return [*above[above.index(path) :], path]
        if path in done:
            return []
        found = next(filter(None, (walk(file, (*above, path)) for file in sorted(filter(None, edges[path])))), [])
        done.add(path)
        return found

    return next(filter(None, (walk(path, ()) for path in sources)), [])


def module_of(name: str, sources: dict[str, str]) -> str | None:
    """The file of the module that a dotted name is, or lies in."""
    path = name.replace(".", "/")
    above = path.rpartition("/")[0]
    return next(
        (file for file in (f"{path}.py", f"{path}/__init__.py", f"{above}.py", f"{above}/__init__.py") if file in sources), None
    )


def test_no_file_imports_another_in_a_circle() -> None:
    assert not circle(SOURCES)
    more = {
        "stages/pipeline/a.py": "from stages.pipeline import b",
        "stages/pipeline/b.py": "def f():\n    import stages.pipeline.a",
    }
    assert circle(SOURCES | more) == ["stages/pipeline/a.py", "stages/pipeline/b.py", "stages/pipeline/a.py"]


def test_drawing_needs_torch_numpy_and_safetensors_alone() -> None:
    waiting, reached = [path for path in SOURCES if room(path) == "drawing"], set[str]()
    others: set[str] = set()
    while waiting:
        path = waiting.pop()
        reached.add(path)
        names = imports(SOURCES[path], path)
        others |= {name.partition(".")[0] for name in names} - {"stages", *sys.stdlib_module_names}
        found_by_name = {file for file in NAMED if "/__init__.py" in path and str(Path(path).parent) in file}
        files = {file for name in names for file in code_of(name, SOURCES)} | found_by_name
        waiting += files - reached - {START}
    assert others == {"torch", "numpy", "safetensors"}
    assert {"stages/networks/unet.py", "stages/diffusion/samplers/heun.py", "stages/diffusion/schedules/cosine.py"} <= reached


def code_of(name: str, sources: dict[str, str]) -> Iterator[str]:
    """The files that an import of a dotted name runs: of the module that it is, or lies in, and of the packages around it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = "/".join(parts[:end])
        yield from (file for file in (f"{path}.py", f"{path}/__init__.py") if file in sources)


def closure(start: str, sources: dict[str, str]) -> set[str]:
    """The files that can change the result of a stage, or of a file of the science, as far as its imports tell.

    That is its own and the science it imports, directly or through the plumbing, whose files count where they are in DECIDING. What
    is found by its name no import tells.
    """
    found, waiting = {start}, [*imports(sources[start]), *used_by_plumbing(sources[start], sources)]
    while waiting:
        for file in code_of(waiting.pop(), sources):
            if file not in found and (room(file) in SCIENCE or file in DECIDING) and file != READING:
                found.add(file)
                waiting += imports(sources[file])
    return found


def used_by_plumbing(source: str, sources: dict[str, str]) -> Iterator[str]:
    """Dotted names of the science that those functions of the plumbing use which a source names."""
    named = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    named |= {name.rpartition(".")[2] for name in imports(source)}
    for path in ("stages/pipeline/checkpoint.py", "stages/pipeline/files.py"):  # they build a classifier, and round results
        known = {name.rpartition(".")[2]: name for name in imports(sources[path])}
        for function in ast.parse(sources[path]).body:
            if isinstance(function, ast.FunctionDef) and function.name in named:
                yield from (known[node.id] for node in ast.walk(function) if isinstance(node, ast.Name) and node.id in known)


@pytest.mark.parametrize("stage", GRAPH)
def test_code_deps_are_the_import_closure_and_what_is_found_by_name(stage: str) -> None:
    listed = [dep for dep in GRAPH[stage]["deps"] if dep.endswith(".py")]
    assert len(listed) == len(set(listed))
    assert {dep for dep in listed if "${" not in dep} == (
        closure(f"stages/{stage}.py", SOURCES) - GLANCED_AT.get(stage, set()) | DEFAULTS.get(stage, set())
    )
    assert {dep for dep in listed if "${" in dep} == {
        f"stages/diffusion/{folder}/{name}.py" for folder, names in found_by_name(stage).items() for name in names
    }


def found_by_name(stage: str) -> dict[str, list[str]]:
    """The choices of a stage, by the folder in which it finds them: it finds where it calls a function that does."""
    known = {"noise_levels": "schedules", "Chain": "samplers"}  # a Chain does both
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(SOURCES[f"stages/{stage}.py"])) if isinstance(node, ast.Call)}
    kinds = {"samplers": ["${sample.fast.sampler}", "${sample.ancestral.sampler}"], "schedules": ["${item.schedule}"]}
    if "Chain" in called:
        return kinds
    return {folder: names for folder, names in kinds.items() if folder in {known.get(name) for name in called}}


def test_what_finds_by_name_is_what_the_check_above_knows() -> None:
    """`find` is called where the deps are known to follow, and nowhere else that a result depends on."""
    callers = {path for path, source in SOURCES.items() if re.search(r"\bfind\(", source) and room(path) in (*SCIENCE, "")}
    allowed = {f"stages/diffusion/{name}.py" for name in ("by_name", "samplers/__init__", "schedules/__init__")}
    assert callers == {*allowed, "stages/drawing/chain.py"}
    assert [stage for stage in GRAPH if found_by_name(stage)] == ["train", "sample", "evaluate"]


@pytest.mark.parametrize("stage", ["train", "sample", "evaluate"])
def test_every_choice_of_a_stage_is_a_file_whose_imports_are_deps_too(stage: str) -> None:
    listed = {dep for dep in GRAPH[stage]["deps"] if dep.endswith(".py")}
    for dep in listed:
        for choice, names in CHOICES.items():
            for name in names if choice in dep else ():
                file = dep.replace(choice, name)
                assert closure(file, SOURCES) <= listed | {file}, file


@pytest.mark.parametrize("path", NAMED)
def test_a_schedule_or_a_sampler_is_one_public_function(path: str) -> None:
    functions = [node.name for node in ast.parse(SOURCES[path]).body if isinstance(node, ast.FunctionDef)]
    assert [name for name in functions if name[0] != "_"] == ["alpha_bar" if "/schedules/" in path else "sample"]


def test_choices_are_what_the_parameters_allow() -> None:
    assert params.AncestralSampler.model_fields["sampler"].annotation == Literal["ddpm"]
    found = {match for stage in GRAPH.values() for dep in stage["deps"] for match in re.findall(r"\$\{[^}]*\}", dep)}
    assert found == {*CHOICES, "${item.dataset}", "${item.seed}", "${key}"}
    assert len(NAMED) == len(by_name.names("schedules")) + len(by_name.names("samplers"))


def test_closure_follows_science_but_not_plumbing() -> None:
    sources = {
        "stages/a.py": "from stages.networks.n import f\nfrom stages.pipeline import checkpoint, plot, grids\n"
        "from stages.drawing.weights import r\nfrom stages.pipeline.files import write\ncheckpoint.load()",
        "stages/networks/n.py": "from stages.networks import deep",
        "stages/networks/deep.py": "",
        "stages/networks/loaded.py": "",
        "stages/networks/unused.py": "",
        "stages/pipeline/plot.py": "from stages.diffusion import s",
        "stages/pipeline/grids.py": "",
        "stages/drawing/weights.py": "from stages.networks import unused",
        "stages/diffusion/s.py": "",
        "stages/fidelity/rounding.py": "",
        "stages/pipeline/checkpoint.py": "from stages.networks.loaded import L\nfrom stages.networks.unused import U\n"
        "def load():\n    return L()\ndef other():\n    return U()",
        "stages/pipeline/files.py": "from stages.fidelity.rounding import rounded\ndef write():\n    rounded()",
    }
    expected = {"stages/a.py", "stages/networks/n.py", "stages/networks/deep.py", "stages/networks/loaded.py"}
    expected |= {"stages/fidelity/rounding.py", "stages/pipeline/grids.py"}
    assert closure("stages/a.py", sources) == expected
    package = dict.fromkeys(("stages/networks/p/__init__.py", "stages/networks/p/m.py"), "")
    source = {"stages/a.py": "from stages.networks.p.m import f"}
    assert closure("stages/a.py", sources | package | source) == {*source, *package}
    rounding = {stage for stage in GRAPH if "stages/fidelity/rounding.py" in GRAPH[stage]["deps"]}
    assert rounding == {"prepare", "extractor", "reference", "train", "evaluate", "compare"}


def declared(source: str) -> set[str]:
    """The entries of `params:` that a stage's main asks for, by the names of its arguments; `runtime` cannot change a result."""
    main = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    names = [argument.arg for argument in main.args.args if argument.arg not in (*SUBJECTS, "runtime", "listener")]
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
        "init": {str(paths.INIT)},
        "prepare": files(paths.prepared, *(f"{name}.safetensors" for name in ("train", "validation", "test")), "dataset.json")
        | files(paths.data_figures, "noising.png", "samples.png"),
        "extractor": {str(paths.extractor(name)), str(paths.scores(stage, name))},
        "reference": {str(paths.reference(name)), str(paths.scores(stage, name))},
        "train": files(paths.weights, "previews.zip", *(f"{n}.safetensors" for n in ("ema", "raw")))
        | {str(paths.loss_curve(name))},
        "sample": files(
            paths.samples,
            "fast.safetensors",
            "ancestral.safetensors",
            "chain.png",
            "grid.png",
            "denoising.gif",
        ),
        "evaluate": {str(paths.scores(stage, name))},
    }
    return made[stage]


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
    for name, stage in GRAPH.items():
        for dep in stage["deps"]:
            if not dep.endswith(".py"):
                assert any(f"{dep}/".startswith(f"{out}/") or f"{out}/".startswith(f"{dep}/") for out in made), dep
        made |= {out.replace("${key}", NETWORK) if name == "train" else out for out in paths.outs(stage)}


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import stages.compare", "torch"),
        ("import stages.sweep.plan", "torch"),
        ("import stages.tracking.mirror", "mlflow"),
        ("import stages.sweep.draw", "mlflow"),
        ("import stages.evaluate", "matplotlib"),
        ("from stages.diffusion import schedules; [schedules.find(name) for name in schedules.names()]", "torch"),
        ("from stages import train; train._set_kernels(deterministic=False)", "torch._inductor"),
    ],
)
def test_starts_without_what_is_slow_to_import_and_not_needed(statement: str, heavy: str) -> None:
    code = f"import sys; {statement}; print({heavy!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
