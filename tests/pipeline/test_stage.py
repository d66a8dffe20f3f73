"""What every stage writes: small JSON files that are the same on any processor."""

from pathlib import Path

import pytest

from stages.pipeline.stage import read_json, write_json


def test_fractions_keep_six_digits_and_whole_numbers_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"fid": 0.3536621169791886, "again": [0.35366211698286065], "seed": 2**53 + 1, "none": None})
    assert read_json(tmp_path / "x.json") == {"fid": 0.353662, "again": [0.353662], "seed": 2**53 + 1, "none": None}
    assert (tmp_path / "x.json").read_bytes().endswith(b"\n")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_json_is_refused_and_the_old_file_stays(tmp_path: Path, bad: float) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"fid": bad})
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert read_json(tmp_path / "x.json") == 1
