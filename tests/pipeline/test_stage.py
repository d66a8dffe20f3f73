"""What every stage writes: small JSON files that are the same on any processor."""

from pathlib import Path

import pytest

from stages import UserError
from stages.pipeline.stage import read_json, sound, write_json


def test_fractions_keep_six_digits_and_whole_numbers_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"fid": 0.3536621169791886, "again": [0.35366211698286065], "seed": 2**53 + 1, "none": None})
    assert read_json(tmp_path / "x.json") == {"fid": 0.353662, "again": [0.353662], "seed": 2**53 + 1, "none": None}
    assert (tmp_path / "x.json").read_bytes().endswith(b"\n")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_json_is_refused_and_the_old_file_stays(tmp_path: Path, bad: float) -> None:
    write_json(tmp_path / "x.json", {"fid": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"fid": bad})
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert read_json(tmp_path / "x.json") == {"fid": 1}


CONFLICT = '{\n<<<<<<< HEAD\n  "seconds": 1\n=======\n  "seconds": 2\n>>>>>>> other\n}\n'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Expecting value"),
        (b'{"seconds": 1', "Expecting"),
        (CONFLICT.encode(), "conflict markers"),
        ('{"seconds": 1}'.encode("utf-16"), "utf-8"),
        (b'{"name": "\xff"}', "utf-8"),
        (b"[1]", "no mapping"),
        (b'{"seconds": NaN}', "NaN is no number"),
        (b"[" * 100_000, "recursion"),
        (b'{"seconds": ' + b"1" * 5000 + b"}", "digits"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json is damaged \(.*\); delete it and run `dvc repro`$") as told:
        read_json(tmp_path / "x.json")
    assert says in str(told.value)
    assert len(str(told.value)) < 500


def test_a_folder_in_place_of_a_file_is_told_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is a directory"):
        read_json(tmp_path)


def test_a_missing_name_and_a_wrong_form_are_told_with_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"split": {"seed": 1}, "classes": [1]})
    about = read_json(tmp_path / "x.json")
    assert about.get("no") is None
    for wrong in (lambda: about["no"], lambda: about["split"]["no"]):
        with pytest.raises(UserError, match=r"x\.json is damaged \(it has no 'no'\)"):
            wrong()
    for wrong in (lambda: about["classes"]["a"], lambda: about["split"].no, lambda: about["classes"][7]):
        with pytest.raises(UserError, match=r"x\.json is damaged"), sound(tmp_path / "x.json"):
            wrong()


def test_a_result_in_git_is_restored_by_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("metrics").mkdir()
    Path("metrics/x.json").touch()
    with pytest.raises(UserError, match=r"`git checkout metrics/x\.json`, or delete it and run `dvc repro`"):
        read_json(Path("metrics/x.json"))
