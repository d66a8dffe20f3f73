"""Killed at random moments, in every way, a pipeline ends with the bits of an unbroken run; benchmarks/kills.py goes on longer."""

import pytest

from benchmarks import kills


@pytest.mark.slow
def test_twelve_kills_change_nothing(tmp_path):
    pipeline = kills.Pipeline(tmp_path / "naqsh")
    first = pipeline.unbroken
    assert len(first) > 15
    result = kills.soak(pipeline, 12, seed=0)
    assert result["faults"] == []
    assert result["kills"] == 12
    # Known-bad: what the check is there to see.
    (tmp_path / "naqsh/samples" / kills.CELL / "grid.png").write_bytes(b"")
    assert pipeline.faults() == [f"differs: samples/{kills.CELL}/grid.png"]
