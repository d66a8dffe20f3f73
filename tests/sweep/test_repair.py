"""What a kill broke of DVC's own files is mended, and all else stays."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest
from dvc import rwlock as dvc_rwlock
from dvc.dvcfile import Lockfile
from dvc.exceptions import DvcException
from dvc.fs import localfs
from dvc.utils import strictyaml
from filelock import FileLock

from stages.errors import UserError
from stages.pipeline import dvc_forms
from stages.sweep import plan, repair

ROOT = Path(__file__).parents[2]
CELL = "mnist-cosine-100-0"


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.fixture
def rwlock(bare_tree: Path) -> Path:
    """DVC's list of who reads and writes what, which has to be written yet."""
    touch(file := bare_tree / ".dvc/tmp/rwlock")
    return file


def dvc_accepts(file: Path) -> bool:
    """Whether DVC itself reads a list of readers, and takes and gives back an entry in it."""
    with dvc_rwlock.rwlock(str(file.parent), localfs, "dvc test", [str(file.parent / "a")], [str(file.parent / "b")], False):
        return True


def test_a_list_of_readers_that_a_kill_cut_off_is_removed_unless_a_dvc_is_at_work(bare_tree: Path) -> None:
    repair.mend_rwlock()  # in a folder without DVC too
    rwlock = bare_tree / ".dvc/tmp/rwlock"
    touch(rwlock)
    rwlock.write_text('{"read": {')
    with FileLock(rwlock.with_name("rwlock.lock")):
        repair.mend_rwlock()
    assert rwlock.exists()
    repair.mend_rwlock()
    assert not rwlock.exists()
    rwlock.write_text("{}")
    repair.mend_rwlock()
    assert rwlock.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"null", b"[]", b"7", b'"x"', b"", b"\0\0\0\0", b"\xff", b'{"write": {"/a": {"pid": 1, "cm', b"[" * 100_000,
        b'{"write": null}', b'{"write": []}', b'{"read": {"/a": null}}', b'{"other": {}}',
        b'{"write": {"/a": [{"pid": 1, "cmd": "dvc"}]}}', b'{"read": {"/a": {"pid": 1, "cmd": "dvc"}}}',
        b'{"write": {"/a": {"pid": "1", "cmd": "dvc"}}}', b'{"write": {"/a": {"pid": 1}}}', b'{"read": {"/a": [7]}}',
        b'{"read": {"/a": [{"pid": 1, "cmd": null}]}}', b'{"read": {"/a": [{"pid": 1, "cmd": "dvc", "more": 1}]}}',
    ],
)  # fmt: skip
def test_a_list_of_readers_of_another_form_is_removed(rwlock: Path, content: bytes) -> None:
    rwlock.write_bytes(content)
    with pytest.raises((DvcException, ValueError, RecursionError, AttributeError, TypeError)):  # so DVC would end, every time
        dvc_accepts(rwlock)
    repair.mend_rwlock()
    assert not rwlock.exists()
    assert dvc_accepts(rwlock)


def test_who_reads_and_writes_no_longer_is_taken_out_and_who_does_stays(rwlock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def start(*arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()", *arguments], stdin=PIPE, stdout=PIPE)
        assert process.stdout
        process.stdout.readline()  # it has its name now
        return process

    alive, other, ended = start("dvc", "repro"), start("something else"), start("dvc", "repro")
    ended.kill()
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    nobody = next(pid for pid in range(2**22 - 1, 1, -1) if not psutil.pid_exists(pid))
    try:
        who = {name: {"pid": process.pid, "cmd": "dvc repro"} for name, process in [("alive", alive), ("other", other)]}
        who |= {"zombie": {"pid": ended.pid, "cmd": "dvc repro"}, "nobody": {"pid": nobody, "cmd": "dvc repro"}}
        who |= {"absurd": {"pid": -7, "cmd": "dvc repro"}, "huge": {"pid": 2**70, "cmd": "dvc repro"}}
        listed = {
            "write": {f"/{name}": one for name, one in who.items()},
            "read": {"/all": list(who.values()), "/other": [who["other"]]},
        }
        rwlock.write_text(json.dumps(listed))
        repair.mend_rwlock()
        assert json.loads(rwlock.read_text()) == {"write": {"/alive": who["alive"]}, "read": {"/all": [who["alive"]]}}
        assert dvc_accepts(rwlock)
        assert "named processes that are gone" in capsys.readouterr().err
        before = rwlock.stat()
        repair.mend_rwlock()
        assert rwlock.stat().st_mtime_ns == before.st_mtime_ns
        assert not capsys.readouterr().err
        os.utime(rwlock, (0, psutil.Process(alive.pid).create_time() - 60))  # a DVC too, but not the one that wrote this
        repair.mend_rwlock()
        assert json.loads(rwlock.read_text()) == {"write": {}, "read": {}}
        assert dvc_accepts(rwlock)
    finally:
        for process in (alive, other, ended):
            process.kill()
            process.communicate()


def entry(stage: str) -> bytes:
    """A record of a stage, as DVC writes it."""
    digest = hashlib.md5(stage.encode()).hexdigest()
    file = f"    - path: data/{digest[:3]}\n      hash: md5\n      md5: {digest}\n      size: 1234\n"
    params = "    params:\n      params.yaml:\n        data.mnist:\n          path:\n"
    return f"  {stage}:\n    cmd: python -m stages\n    deps:\n{file}{params}    outs:\n{file}".encode()


STARTS = b"schema: '2.0'\nstages:\n"
ENTRIES = [entry(stage) for stage in ("fetch@mnist", "prepare@mnist", "extractor@mnist")]
WHOLE = STARTS + b"".join(ENTRIES)
LAST = len(WHOLE) - len(ENTRIES[2])
OTHER = entry("prepare@mnist").replace(b"1234", b"5678")  # what was committed of it, before


def ask_dvc() -> subprocess.CompletedProcess[str]:
    """What `dvc status` says of a dvc.lock: whether DVC reads it. It takes seconds to say more."""
    try:
        if Path("dvc.lock").stat().st_size:  # of nothing, DVC makes no records
            strictyaml.load("dvc.lock", schema=Lockfile.SCHEMA)
    except DvcException as error:
        return subprocess.CompletedProcess([], 255, "", f"ERROR: {error}")
    return subprocess.CompletedProcess([], 0, "{}", "")


@pytest.fixture
def lock(bare_tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dvc.lock that has to be written yet."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(bare_tree.parent))
    monkeypatch.setattr(dvc_forms, "status", ask_dvc)
    return bare_tree / "dvc.lock"


CUTS: list[tuple[bytes, int]] = [  # and how many entries are whole
    (b"", 0),
    (b"\n", 0),
    (b"\0" * len(WHOLE), 0),
    (b"sche", 0),
    (STARTS, 0),
    (STARTS + b"  fetch", 0),
    (WHOLE[: LAST - 300], 1),  # in the middle of an entry
    (WHOLE[: WHOLE.rindex(b"hash: ") + 5], 2),  # in the middle of a line
    (WHOLE[:LAST] + b"  extractor@mnist:\n", 2),
    (WHOLE[: WHOLE.rindex(b"      md5: ")], 2),  # DVC reads it
    (WHOLE[: LAST + 300] + b"\0" * 300, 2),
    (WHOLE[: LAST + 300] + b"\xff\xfe", 2),
    (WHOLE[: LAST - 200] + b"\0" * 100 + WHOLE[LAST - 100 :], 1),  # a block that never reached the disk
]
COMMITTED = [ENTRIES[0], OTHER]


@pytest.mark.parametrize(
    ("cut", "kept", "committed"),
    [*((*case, COMMITTED) for case in CUTS), *((*CUTS[i], nothing) for i in (0, 6) for nothing in (None, list[bytes]()))],
)
def test_a_lock_that_was_cut_off_comes_back_from_its_rest_and_from_git(
    lock: Path, cut: bytes, kept: int, committed: list[bytes] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if committed is not None:
        lock.write_bytes(STARTS + b"".join(committed))
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run(["git", "add", "dvc.lock" if committed else "params.yaml"], check=True)
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "x"], check=True)
    lock.write_bytes(cut)
    plan.plan(1)
    said = capsys.readouterr().err
    entries = ENTRIES[:kept] + (committed or [])[kept:]
    assert lock.read_bytes() == (STARTS + b"".join(entries) if entries else b"schema: '2.0'\nstages: {}\n")
    assert said == "dvc.lock was cut off while DVC wrote it: mended from its rest and the last commit\n"


@pytest.mark.parametrize("cut", [WHOLE, WHOLE[:LAST], WHOLE[:-3], WHOLE[: WHOLE.rindex(b"    outs:")]])
def test_a_lock_that_dvc_reads_stays(lock: Path, cut: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages without a record, or with a part of one, DVC finds in its run cache."""
    lock.write_bytes(cut)
    plan.plan(1)
    assert lock.read_bytes() == cut
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (WHOLE.replace(b"  prepare@", b"<<<<<<< HEAD\n  prepare@", 1), "conflict markers of git; `git checkout --ours dvc.lock`"),
        (WHOLE + b">>>>>>> \xff\n", "conflict markers"),
        (b"note: mine [\n" + WHOLE, "is damaged .*; `git checkout dvc.lock`"),
        (b"\xff\xfe" + WHOLE, "is damaged"),
        (WHOLE.replace(b"'2.0'", b"'1.0'").replace(b"    cmd", b"   cmd"), "is damaged"),
        (b"[]\n", "is damaged"),
    ],
)
def test_a_lock_that_no_kill_damaged_stays_byte_for_byte(lock: Path, content: bytes, says: str) -> None:
    lock.write_bytes(content)
    with pytest.raises(UserError, match=rf"^dvc\.lock .*{says}"):
        plan.plan(1)
    assert lock.read_bytes() == content


def test_a_lock_that_dvc_refuses_when_mended_is_put_back(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.write_bytes(cut := WHOLE[: LAST + 300] + b"\xff")
    refusal = subprocess.CompletedProcess([], 1, "", "ERROR: dvc.lock is\n git-ignored\n")
    monkeypatch.setattr(dvc_forms, "status", lambda: refusal)
    with pytest.raises(UserError, match=r"^`dvc status` failed: ERROR: dvc\.lock is git-ignored$"):
        plan.plan(1)
    assert lock.read_bytes() == cut


@pytest.mark.parametrize("content", [b"\xff", STARTS + b"  fetch@mnist:\n", STARTS + ENTRIES[0][:-3] + b"\0\0"])
def test_who_reads_a_lock_that_was_cut_off_is_told_in_one_line(bare_tree: Path, content: bytes) -> None:
    (bare_tree / "dvc.lock").write_bytes(content)
    with pytest.raises(UserError, match=r"^dvc\.lock is (damaged|not YAML)[^\n]*$"):
        dvc_forms.recorded(dvc_forms.read_lock(), "fetch@mnist")
