"""A person's own files: where they are, and that a change of them is told."""

from pathlib import Path

import pytest

from stages.pipeline import params, sources

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loaded(path: str) -> params.Params:
    values = params.load(ROOT / "params.yaml").model_dump()
    values["data"]["persian_hoda"]["path"] = path
    values["sweep"]["datasets"] = ["persian_hoda", "mnist"]
    return params.Params.model_validate(values)


def test_relative_paths_start_at_the_repository_also_in_a_temporary_copy_of_it(tmp_path, monkeypatch):
    copy = tmp_path / ".dvc/tmp/exps/standalone/abc"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    found = sources.resolved({"reader": "mix", "of": {"a": {"path": "mine"}, "b": {"path": None}, "c": {"path": "/x"}}})
    assert found == {"reader": "mix", "of": {"a": {"path": str(tmp_path / "mine")}, "b": {"path": None}, "c": {"path": "/x"}}}
    assert sources.resolved({"path": "~/mine"})["path"] == str(Path.home() / "mine")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "new").write_text("x"), "3 files then, 4 now"),
        (lambda folder: (folder / "sub/two").unlink(), "3 files then, 2 now"),
        (lambda folder: (folder / "one").write_text("longer"), "3 files, other names, sizes or times"),
        (lambda folder: (folder / "one").rename(folder / "uno"), "3 files, other names, sizes or times"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "3 files then, 0 now"),
    ],
)
def test_a_change_is_told_with_what_takes_it_in(tmp_path, change, says):
    folder = tmp_path / "digits"
    (folder / "sub").mkdir(parents=True)
    for name in ("one", "sub/two", "sub/\u06f3"):
        (folder / name).write_text("x")
    now = loaded("digits")
    assert sources.changed(now) == [], "never fetched here: nothing to compare with"
    sources.remember("persian_hoda", sources.look(sources.resolved(now.data["persian_hoda"].model_dump())))
    assert sources.changed(now) == []
    change(folder)
    (line,) = sources.changed(now)
    assert line.startswith(f"{folder} changed since persian_hoda was fetched")
    assert says in line
    assert line.endswith("`dvc repro -f fetch@persian_hoda` takes it in")


def test_another_path_is_no_change_for_dvc_sees_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    sources.remember("persian_hoda", sources.look(sources.resolved(loaded("a").data["persian_hoda"].model_dump())))
    assert sources.changed(loaded("b")) == []
