"""Killed at every place and in every way, `make repro` stops, goes on, and ends with the bits of an unbroken run."""

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from benchmarks import kills


def test_kills_are_spread_over_every_place_and_every_way():
    drawn = list(islice(kills.drawn(random.Random(0)), 50))
    places = Counter(kill.place for kill in drawn)
    assert set(places) == set(kills.PLACES)
    assert max(places.values()) - min(places.values()) <= 1
    assert {(kill.whom, kill.how) for kill in drawn} == set(kills.WAYS)


def test_a_round_goes_through_the_pipeline_in_its_order():
    drawn = [kills.Kill(place, "", "make", "SIGTERM") for place in ("sync", "train", "MLflow", "fetch")]
    after = kills.Kill("between", "train", "make", "SIGTERM")
    ordered = kills.in_order([*drawn, after], random.Random(0))
    assert [kill.place for kill in ordered] == ["fetch", "MLflow", "train", "between", "sync"]


@pytest.mark.slow
def test_eight_kills_change_nothing_and_known_faults_are_seen(tmp_path):
    pipeline = kills.Pipeline(tmp_path / "naqsh")
    assert len(pipeline.unbroken) > 30
    result = kills.soak(pipeline, 8, seed=0)
    assert result["faults"] == [], json.dumps(result, indent=2)
    assert sum(result["places"].values()) == sum(result["ways"].values()) == result["kills"] == 8

    # Known-bad: what the check is there to see.
    grid = pipeline.folder / "samples" / kills.CELLS[0] / "grid.png"
    whole = grid.read_bytes()
    grid.write_bytes(b"")
    (pipeline.folder / "models/.ema.partial.safetensors").touch()
    found = pipeline.faults()
    assert f"differs: samples/{kills.CELLS[0]}/grid.png" in found
    assert "left over: models/.ema.partial.safetensors" in found
    grid.write_bytes(whole)


def test_a_process_that_runs_on_is_seen(tmp_path):
    pipeline = object.__new__(kills.Pipeline)  # nothing is made
    pipeline.folder, pipeline.temporary = tmp_path, tmp_path / "tmp"
    assert pipeline.left(0) == []
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=tmp_path) as process:
        try:
            assert pipeline.left(0.1) == [f"still running: other {sys.executable} -c import time; time.sleep(60)"]
            assert kills._outlasts(pipeline.processes(), 0.1) is None
        finally:
            process.kill()
    assert pipeline.left(0) == []
