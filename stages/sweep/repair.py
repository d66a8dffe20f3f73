"""What a kill or a full disk broke of DVC's own files is mended before DVC runs."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from stages.errors import damaged
from stages.pipeline import dvc_forms
from stages.pipeline.dvc_forms import LOCK, WORKING
from stages.pipeline.files import whole_file
from stages.pipeline.processes import is_alive
from stages.tracking.git import git


def mend_rwlock() -> None:
    """Take out of DVC's list of who reads and writes what those who do so no longer; remove it where a kill cut it off.

    DVC itself asks only whether there is a process of that number, which may be another program by now.
    """
    with contextlib.suppress(Timeout, FileNotFoundError), FileLock(WORKING.with_name("rwlock.lock"), timeout=0):  # as DVC holds it
        written = WORKING.stat().st_mtime
        try:
            write, read = dvc_forms.working(json.loads(WORKING.read_bytes()))
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            WORKING.unlink()
            print(f"A kill of DVC cut {WORKING} off: removed", file=sys.stderr)
            return
        writers = {path: who for path, who in write.items() if _is_dvc(who["pid"], written)}
        readers = {path: [one for one in who if _is_dvc(one["pid"], written)] for path, who in read.items()}
        if writers != write or readers != read:
            with whole_file(WORKING) as temporary:
                temporary.write_text(json.dumps({"write": writers, "read": {path: who for path, who in readers.items() if who}}))
            print(f"{WORKING} named processes that are gone: taken out", file=sys.stderr)


def _is_dvc(pid: int, since: float) -> bool:
    """Whether a process is a DVC that was there already at a time."""
    with contextlib.suppress(psutil.Error, ValueError, OverflowError):  # the latter two: no process has such a number
        process = psutil.Process(pid)
        return is_alive(process) and process.create_time() <= since + 1 and "dvc" in " ".join(process.cmdline())
    return False


def needs_mending(asked: "subprocess.CompletedProcess[str]") -> bool:
    """Whether dvc.lock is empty, or DVC said that it cannot read it, or its last entry lacks what DVC itself does not miss."""
    content = LOCK.read_bytes() if LOCK.exists() else None
    if content is None or (asked.returncode and str(LOCK) in asked.stderr):
        return content is not None
    return not content.strip(b"\0 \n") or dvc_forms.ends_in_a_part(content)


def mend_lock() -> "subprocess.CompletedProcess[str]":
    """Give dvc.lock back what a kill or a full disk took from it while DVC wrote it. What DVC says of it then.

    What is whole of it stays; what is missing then comes from the last commit. What neither has, DVC finds in its run cache, by
    code, parameters and data. The file stays as it is where something else is wrong with it.
    """
    content = LOCK.read_bytes()
    dvc_forms.refuse_conflict(content)
    if not dvc_forms.is_cut(content):
        raise damaged(LOCK, "it is not as DVC writes it")
    committed = dvc_forms.lock_entries(git("show", f"HEAD:./{LOCK}") or "")
    _write_bytes(LOCK, dvc_forms.lock_of(committed | dvc_forms.whole_entries(content)))
    asked = dvc_forms.status()
    if asked.returncode and str(LOCK) in asked.stderr:
        _write_bytes(LOCK, content)
    else:
        print(f"{LOCK} was cut off while DVC wrote it: mended from its rest and the last commit", file=sys.stderr)
    return asked


def _write_bytes(path: Path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
