"""A person's own files: where they are, and that a change of them is told."""

import inspect
import re
from pathlib import Path

import pytest
from dvc.utils.serialize import dump_yaml

from stages.datasets import readers
from stages.errors import UserError
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


def remember(now: params.Params) -> None:
    source = sources.Source.of("persian_hoda", sources.resolved(now.data["persian_hoda"].model_dump()))
    source.remember(Path("nothing"))


def test_a_source_that_is_gone_is_told_without_asking_to_take_that_in(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/one").touch()
    remember(loaded("digits"))
    (tmp_path / "digits").rename(tmp_path / "unmounted")
    assert sources.changed(loaded("digits")) == [f"{tmp_path / 'digits'} is not there; persian_hoda stays as it was fetched"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "new").write_text("x"), "3 files then, 4 now"),
        (lambda folder: (folder / "sub/two").unlink(), "3 files then, 2 now"),
        (lambda folder: (folder / "one").write_text("longer"), "3 files, other names, sizes or times"),
        (lambda folder: (folder / "one").rename(folder / "uno"), "3 files, other names, sizes or times"),
    ],
)
def test_a_change_is_told_with_what_takes_it_in(tmp_path, change, says):
    folder = tmp_path / "digits"
    (folder / "sub").mkdir(parents=True)
    for name in ("one", "sub/two", "sub/\u06f3"):
        (folder / name).write_text("x")
    now = loaded("digits")
    assert sources.changed(now) == [], "never fetched here: nothing to compare with"
    remember(now)
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
    remember(loaded("a"))
    assert sources.changed(loaded("b")) == []


def folder(path: str) -> params.FolderData:
    options = {"licence": "x", "size": 16, "invert": False, "pad": True, "strict": False}
    options |= {"group": None, "validation_share": 0.1, "test_share": 0.2, "seed": 0}
    return params.FolderData(reader="folder", path=path, **options)


@pytest.fixture
def graph(tmp_path):
    """The project's graph and parameters, in the empty folder."""
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize(
    ("path", "how"),
    [
        ("data/raw/mnist.fetched.zip", "is data/raw/mnist.fetched.zip"),
        ("models/networks/mnist-cosine-0", "contains models/networks/mnist-cosine-0/"),
        ("data/raw", "contains data/raw/mnist.fetched.zip"),
        (".", "contains data/raw/mnist.fetched.zip"),
        ("data/../data", "contains data/raw/mnist.fetched.zip"),
        ("/", "contains data/raw/mnist.fetched.zip"),
        ("link", "contains data/raw/mnist.fetched.zip"),
        ("metrics/summary.json/deeper", "lies inside metrics/summary.json"),
    ],
)
def test_a_source_among_the_outputs_is_refused(tmp_path, path, how):
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data/raw")
    with pytest.raises(UserError, match=re.escape(f"data.mine.path = {path} {how}")) as refused:
        sources.refuse_outputs("mine", folder(path))
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("graph")
def test_a_source_in_the_part_of_a_mix_or_behind_a_link_of_the_outputs_is_refused(tmp_path):
    mix = params.MixData(reader="mix", of={"a": folder("fine"), "b": folder("data")})
    with pytest.raises(UserError, match=r"data\.mine\.of\.b\.path = data contains"):
        sources.refuse_outputs("mine", mix)
    (tmp_path / "big/raw").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "big")
    with pytest.raises(UserError, match=r"data\.mine\.path = big/raw contains"):
        sources.refuse_outputs("mine", folder("big/raw"))


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize("path", ["data/raw/letters", "data/raw/letters.zip", "pictures", "data/hoda", "../outside", "~/letters"])
def test_a_source_beside_the_outputs_is_fine(path):
    sources.refuse_outputs("mine", folder(path))


def test_a_source_that_is_not_there_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "there").mkdir()
    sources.refuse_missing("mine", folder("there"))
    for path in ("nowhere", "x" * 5000, "there/no\0"):
        with pytest.raises(UserError, match=rf"^data\.mine\.path = {path}: there is no such file or folder$"):
            sources.refuse_missing("mine", folder(path))
    mix = params.MixData(reader="mix", of={"a": folder("there"), "b": folder("nowhere")})
    with pytest.raises(UserError, match=r"^data\.mine\.of\.b\.path = nowhere: "):
        sources.refuse_missing("mine", mix)


def test_a_source_that_is_gone_but_was_fetched_from_here_or_elsewhere_is_not_refused(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/1.png").touch()
    mine = params.AutoData(reader="auto", path="disk")
    sources.Source.of("mine", sources.resolved(mine.model_dump())).remember(Path("nothing"))
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    sources.refuse_missing("mine", mine)
    with pytest.raises(UserError, match=r"no such file or folder$"):
        sources.refuse_missing("other", mine)
    elsewhere = {"other": {"cmd": "x", "params": {"params.yaml": {"data.other": {"reader": "auto", "path": "disk", "size": 32}}}}}
    dump_yaml("dvc.lock", {"schema": "2.0", "stages": {"fetch@other": elsewhere["other"]}})
    sources.refuse_missing("other", mine)
    with pytest.raises(UserError, match=r"data\.other\.path = else: there is no such file or folder$"):
        sources.refuse_missing("other", params.AutoData(reader="auto", path="else"))


def test_options_that_decide_the_raw_files_are_known():
    """Every option that a reader's fetch takes by name, and no other."""
    taken = {
        name
        for reader in readers.READERS.values()
        for name, parameter in inspect.signature(reader.fetch).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert taken == {*sources.DECISIVE, "of"} - {"reader"}


def test_links_that_lead_in_a_circle_are_told(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match=r"^path = .*/a: its links lead in a circle$"):
        sources.resolved({"path": str(tmp_path / "a")})


@pytest.mark.parametrize("path", ["~", "~/digits.zip"])
def test_a_home_folder_that_nobody_knows_is_told(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    def unknown(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(UserError, match=rf"^path = {path}: that home folder is unknown here; write the path without ~$"):
        sources.resolved({"reader": "mixed", "of": {"mine": {"path": path}}})
