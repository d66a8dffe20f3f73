"""What every stage writes, whole or not at all, and how it ends where the machine is in the way."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from stages.drawing.weights import load_tensors
from stages.errors import UserError, in_one_line, sound
from stages.pipeline import clocks, params, stage
from stages.pipeline.checkpoint import save_tensors
from stages.pipeline.files import read_json, whole_file, whole_files, whole_folder, write_archive, write_json
from stages.sweep import engine, plan
from stages.tracking import __main__ as command

ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may be larger than 64 KiB: to write on fails in the middle, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(folder: Path) -> None:
    (folder / "small").write_bytes(bytes(9))
    (folder / "large").write_bytes(bytes(2**18))


def picture(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)
    with whole_file(path) as temporary:
        Image.fromarray(noise).save(temporary)


def folder(path: Path) -> None:
    with whole_folder(path) as temporary:
        fill(temporary)


def files(path: Path) -> None:
    with whole_files(path) as temporary:
        fill(temporary)


WRITERS: dict[str, Callable[[Path], None]] = {
    "x.safetensors": lambda path: save_tensors(path, {"x": torch.zeros(2**16)}),
    "x.json": lambda path: write_json(path, ["x" * 2**18]),
    "x.zip": lambda path: write_archive(path, Path(np.__file__).parent / "random"),
    "x.png": picture,
    "x.gif": picture,
    "folder": folder,
    "files": files,
}


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at its end", "while it prints"])
def test_a_program_ends_silently_when_nobody_reads_its_output(lines: int) -> None:
    code = f"from stages.errors import in_one_line\nwith in_one_line('stage'):\n    for i in range({lines}): print(i)"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit) as ended, in_one_line("stage"):
        WRITERS[name](tmp_path / name)
    said = str(ended.value.code)
    assert said.startswith("stage: ")
    assert "File too large. When that is mended, run the same command again" in said
    assert "\n" not in said
    assert Path(name).suffix == "" or str(tmp_path / name) in said
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("full_disk")
def test_what_a_full_disk_refuses_leaves_the_old_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    with pytest.raises(OSError, match="File too large"):
        save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2**16)})
    assert load_tensors(tmp_path / "x.safetensors")[0]["x"].tolist() == [1, 1]


def test_trouble_of_the_machine_is_one_line_and_a_mistake_of_the_code_is_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^stage: params\.yaml: train has no x$"), in_one_line("stage"):
        raise UserError("params.yaml: train has no x")
    with pytest.raises(SystemExit, match=r"^stage: /a: Read-only file system\. When"), in_one_line("stage"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/a")
    (tmp_path / ".state").touch()
    with pytest.raises(SystemExit, match=r"\.state/locks: Not a directory"), in_one_line("stage"):
        (tmp_path / ".state/locks").mkdir(parents=True, exist_ok=True)
    with pytest.raises(FileNotFoundError), in_one_line("stage"):
        (tmp_path / "no").read_bytes()
    with pytest.raises(ZeroDivisionError), in_one_line("stage"):
        print(1 / 0)


class Heard(stage.Listener):
    """Keeps what it hears."""

    told: ClassVar[list[object]] = []

    def start(self) -> None:
        self.told.append("start")

    def point(self, numbers: dict[str, float], picture: Path, share: float, seconds_left: float) -> None:
        self.told.append(numbers["step"])

    def end(self, error: BaseException | None) -> None:
        self.told.append(type(error))


@pytest.mark.parametrize("error", [None, UserError("no"), ZeroDivisionError(), KeyboardInterrupt()])
def test_a_listener_hears_of_start_points_and_end(
    error: BaseException | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(dataset: str, listener: stage.Listener) -> None:
        assert dataset == "mnist"
        listener.point({"step": 1}, Path("x.png"), 0.5, 1.0)
        if error:
            raise error

    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fetch.py", "mnist"])
    monkeypatch.setattr(Heard, "told", told := [])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    ends = (SystemExit, ZeroDivisionError) if error else ()
    with pytest.raises(ends) if ends else contextlib.nullcontext():
        stage.run(main, Heard)
    assert told == ["start", 1, type(error)]
    measured = clocks.read("fetch", "mnist", clocks.now("fetch", "mnist"))
    assert (measured.get("seconds", -1) >= 0) == (error is None)


def make() -> object:
    """What `make repro` starts."""
    return engine.main([])


@pytest.mark.parametrize(
    ("start", "arguments", "fails"),
    [
        (plan.main, ["plan"], (params, "load")),
        (plan.main, ["prune", "--yes"], (plan, "leftovers")),
        (plan.main, ["profile", "gpu"], (params, "write")),
        (make, [], (plan, "plan")),
        (make, [], (engine, "run")),
        (command.main, [], (params, "load")),
    ],
)
def test_every_command_ends_with_one_line_in_a_folder_that_is_read_only(
    start: Callable[[], object], arguments: list[str], fails: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "params.yaml")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    if start is make:
        monkeypatch.setattr(plan, "plan", lambda *_: [])
    monkeypatch.setattr(*fails, refuse)
    with pytest.raises(SystemExit, match=r"^[\w]+: params\.yaml: Read-only file system\. When that is mended, [^\n]*$"):
        start()


def test_a_user_without_a_name_gets_one() -> None:
    code = """
import getpass, os, pwd
for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
def unknown(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
import stages
print(getpass.getuser(), os.environ["LOGNAME"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"user-{os.getuid()} user-{os.getuid()}\n"
