"""Units side by side: who waits for whom, what is shown, what one that fails stops, what a dvc that is killed leaves running."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from stages.pipeline import clocks, dvc_forms, params, processes
from stages.sweep import display as display_of
from stages.sweep import engine, plan
from stages.sweep.display import Display
from stages.sweep.units import Unit

DVC = """
import json, os, signal, sys, time
for stage in sys.argv[1:]:
    kind = stage.partition("@")[0]
    begun = time.monotonic()
    print(f"Running stage '{stage}':\\n> python -m stages.{kind}", flush=True)
    print(f"{stage}: going on from step 7 of 9", flush=True) if kind == "resumed" else None
    print("begun on A, here it is B: the bits will be of both", flush=True) if kind == "resumed" else None
    print("this processor has no bf16 arithmetic and emulates it, slowly", flush=True) if kind == "resumed" else None
    time.sleep(0.5)
    if kind == "bad":
        print("bad: the loss became nan at step 3")
        print(f"ERROR: failed to reproduce '{stage}': failed to run: python -m stages.bad, exited with 1", file=sys.stderr)
        sys.exit(255)
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    with open("ran", "a") as file:
        print(json.dumps([stage, begun, time.monotonic(), os.environ["NAQSH_CORES"]]), file=file)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs units through what only looks like DVC; the names of those that failed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.py").write_text(DVC)
    monkeypatch.setattr(dvc_forms, "REPRO", (sys.executable, "dvc.py"))
    monkeypatch.setattr(processes, "cores", lambda: 4)
    monkeypatch.setattr(plan, "score", lambda cell: "FID 1.0")

    def run(todo: list[Unit], jobs: int) -> list[str]:
        with Display(todo, jobs, dict.fromkeys((unit.name for unit in todo), None)) as display:
            return engine.run(todo, jobs, display)

    return run


def ran() -> dict[str, tuple[float, float, str]]:
    """When each stage that ran to its end began and ended, and its share of the CPUs."""
    return {stage: (begun, ended, cores) for stage, begun, ended, cores in map(json.loads, Path("ran").read_text().splitlines())}


def cell(T: int, *kinds: str, needs: tuple[str, ...] = ()) -> Unit:
    name = f"a-x-{T}-0"
    return Unit(name, tuple(f"{kind}@{name}" for kind in kinds), needs)


def test_as_many_as_are_asked_for_run_at_a_time_and_none_before_what_it_needs(run: Callable[..., list[str]]) -> None:
    data = Unit("data@a", ("fetch@a",), ())
    todo = [data, *(cell(T, "sample", needs=("data@a",)) for T in (1, 2, 3)), Unit("compare", ("compare",), ("a-x-3-0",))]
    assert run(todo, 2) == []
    times = {stage: (begun, ended) for stage, (begun, ended, _) in ran().items()}
    first = times.pop("fetch@a")
    assert all(begun > first[1] for begun, _ in times.values())
    assert times["sample@a-x-2-0"][0] < times["sample@a-x-1-0"][1], "side by side"
    assert times["sample@a-x-3-0"][0] > min(times["sample@a-x-1-0"][1], times["sample@a-x-2-0"][1]), "not three"
    assert times["compare"][0] > times["sample@a-x-3-0"][1]
    assert [share for _, _, share in ran().values()][:3] == ["4", "2", "2"]
    Path("ran").unlink()
    assert run(todo, 1) == []
    begun = [begun for begun, _, _ in ran().values()]
    assert begun == sorted(begun)
    assert all(end < begin for (_, end, _), (begin, _, _) in zip(list(ran().values()), list(ran().values())[1:], strict=False))


def test_what_fails_stops_what_needs_it_and_nothing_else(run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    bad = Unit("train@a-x-0", ("bad@a-x-0",), ())
    follows = [cell(T, "sample", "evaluate", needs=("train@a-x-0",)) for T in (1, 2)]
    dies, other = Unit("train@b-x-0", ("dies@b-x-0",), ()), cell(3, "sample", "evaluate")
    compare = Unit("compare", ("compare",), ("a-x-1-0", "a-x-2-0", "a-x-3-0"))
    assert run([bad, *follows, dies, other, compare], 2) == [bad.name, "a-x-1-0", "a-x-2-0", "compare", dies.name]
    assert ran().keys() == {"sample@a-x-3-0", "evaluate@a-x-3-0"}
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "train@a-x-0 failed: bad: the loss became nan at step 3 (all that it said: .state/logs/train@a-x-0.log)",
        "  left out, for they need it: a-x-1-0, a-x-2-0, compare",
        "train@b-x-0 failed: DVC was ended by SIGKILL (all that it said: .state/logs/train@b-x-0.log)",
        "cell 1 of 3: a-x-3-0  FID 1.0  sampled",
    ]
    assert "Running stage 'bad@a-x-0'" in Path(".state/logs/train@a-x-0.log").read_text()


@pytest.mark.parametrize(
    ("went", "word"),
    [
        ("ran ran ran", "trained"),
        ("kept ran ran", "sampled"),
        ("kept kept ran", "scored"),
        ("restored kept kept", "restored"),
        ("kept kept restored", "restored"),
        ("kept kept kept", "up to date"),
    ],
)
def test_a_line_says_how_a_cell_came_about(
    went: str, word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "score", lambda cell: "FID 1.0")
    train, drawn = Unit("train@a-x-0", ("train@a-x-0",), ()), cell(1, "sample", "evaluate", needs=("train@a-x-0",))
    display, ways = (
        Display([train, drawn], 1, {train.name: 3.0, drawn.name: 1.0}),
        dict(zip((*train.stages, *drawn.stages), went.split(), strict=True)),
    )
    for unit in (train, drawn):
        display.started(unit)
        display.ended(unit, {stage: ways[stage] for stage in unit.stages}, well=True)
    assert capsys.readouterr().out == f"cell 1 of 1: a-x-1-0  FID 1.0  {word}\n"


def test_time_left_is_of_what_was_recorded_and_of_this_run(
    run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run([cell(T, "sample") for T in (1, 2)], 1) == []
    assert "a-x-1-0  FID 1.0  sampled  about 10 s left\n" in capsys.readouterr().out, "what the first took"
    todo = [cell(T, "sample") for T in (1, 2, 3)]
    display = Display(todo, 2, {unit.name: 3000.0 for unit in todo})
    assert display.seconds_left() == 6000
    clock = [0.0]
    monkeypatch.setattr(display_of, "monotonic", lambda: clock[0])
    display.started(cell(1, "sample"))
    clock[0] = 1000
    assert display.seconds_left() == 5000
    clock[0] = 1500
    display.ended(cell(1, "sample"), {"sample@a-x-1-0": "ran"}, well=True)
    assert display.seconds_left() == 1500, "twice as fast as recorded"


def test_a_stage_that_goes_on_is_told(run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([Unit("train@a-x-0", ("resumed@a-x-0",), ())], 1) == []
    assert capsys.readouterr().out.splitlines() == [
        "resumed@a-x-0: going on from step 7 of 9",
        "begun on A, here it is B: the bits will be of both",
        "this processor has no bf16 arithmetic and emulates it, slowly",
    ]


def test_a_unit_waits_for_memory_but_not_for_ever(
    run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_free_mib", lambda: 2000.0)
    monkeypatch.setattr(clocks, "expected", lambda name, what: 1200.0 if what == "peak_memory_mib" else None)
    assert run([cell(T, "sample") for T in (1, 2)], 2) == []
    times = ran()
    assert times["sample@a-x-2-0"][0] > times["sample@a-x-1-0"][1]
    assert "a-x-2-0 waits for memory: it may take 1200 MiB, 800 are free\n" in capsys.readouterr().out
    monkeypatch.setattr(engine, "_free_mib", lambda: 100.0)
    assert run([cell(1, "sample")], 2) == []


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5", "²", ""])
def test_a_number_of_jobs_that_is_none_is_refused(jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=re.escape(f"repro: JOBS = {jobs!r} is no number of units from 1 up")):
        engine.main(["--jobs", jobs])


def test_a_second_repro_in_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "plan", lambda *_: pytest.fail("the second one began"))
    params.REPRO_LOCK.parent.mkdir(parents=True)
    with (
        FileLock(params.REPRO_LOCK),
        pytest.raises(SystemExit, match="repro: another `make repro` works in this folder; wait for it"),
    ):
        engine.main([])
