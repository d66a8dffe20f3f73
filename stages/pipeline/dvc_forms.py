"""All that is known here of DVC's private forms: dvc.lock, its list of who works, what makes a stage out of date, its folders.

Written for DVC 3.67. tests/pipeline/test_dvc_forms.py compares each with what the installed DVC does.
"""

import contextlib
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from stages.errors import UserError, damaged, sound
from stages.pipeline import graph, params, paths
from stages.pipeline.files import md5

VERSION = "3.67"
YAML, LOCK, WORKING, HELD = Path("dvc.yaml"), Path("dvc.lock"), Path(".dvc/tmp/rwlock"), Path(".dvc/tmp/lock")
LOCK_STARTS = b"schema: '2.0'\nstages:\n"

REPRO = (sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item")  # of stages, whose names follow, side by side
_WENT = re.compile(
    r"^(?:Running stage '(?P<ran>.+)':|Stage '(?P<restored>.+)' is cached - .*|Stage '(?P<kept>.+)' didn't change.*)$", re.M
)

Stage = dict[str, Any]
"""A section of dvc.yaml: matrix, cmd, params, deps, outs, metrics, plots."""
Who = dict[str, Any]
"""A process: pid, cmd."""


def workspace() -> Path:
    """The root of the working tree; for a temporary one of DVC's (`--temp`, the queue), the root it was made from."""
    here = Path.cwd().resolve()
    for parent in here.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return here


def stages() -> dict[str, Stage]:
    """The stages of dvc.yaml, by name, each after those whose outputs it reads."""
    return graph.in_order(params.read_yaml(YAML)["stages"])


def status() -> subprocess.CompletedProcess[str]:
    """What `dvc status --json` gives."""
    return subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True)


def went(said: str) -> dict[str, str]:
    """What `dvc repro` says of the stages that it came to so far: each ran (the last may still), was restored, or was kept."""
    return {match[match.lastgroup or 0]: str(match.lastgroup) for match in _WENT.finditer(said)}


def trouble(said: str, code: int) -> str:
    """Why a `dvc repro` failed, in one line: the last of the stage, or else of DVC. `code`: its return code."""
    errors = re.findall(r"^ERROR: (.*)", said, re.MULTILINE)
    of_stage = re.search(r"failed to run: .*, exited with (-?\d+)$", errors[0]) if errors else None
    if ended := _signal(code, "DVC") or (of_stage and _signal(int(of_stage[1]), "it")):
        return ended
    own = said[: said.index("ERROR: ")].rpartition("\n> ")[2].strip().splitlines()[1:] if of_stage else []
    return own[-1] if own else errors[0] if errors else f"DVC ended with {code}"


def _signal(code: int, whom: str) -> str:
    number = -code if code < 0 else code - 128
    return f"{whom} was ended by {signal.Signals(number).name}" if number in [*signal.Signals] else ""


def outputs(loaded: params.Params) -> list[str]:
    """The paths of all that the stages of the sweep write, as dvc.yaml names them."""
    return list(
        dict.fromkeys(
            paths.of_item(out, paths.item_of(stage, str(cell)))
            for cell in loaded.sweep.cells()
            for stage in stages().values()
            for out in paths.outs(stage)
        )
    )


def read_lock() -> dict[str, str]:
    """The entries of dvc.lock; none where there is no such file. Raises UserError when it is no text, or two texts at once."""
    try:
        with _no_writer():
            content = LOCK.read_bytes() if LOCK.exists() else b""
        refuse_conflict(content)
        return lock_entries(content.decode().replace("\r\n", "\n"))
    except (OSError, UnicodeError) as error:
        raise damaged(LOCK, error) from None


@contextlib.contextmanager
def _no_writer() -> Iterator[None]:
    """While no DVC writes dvc.lock, which it does in place, with this lock held; not for long, so it is not waited for longer.

    While DVC runs a stage it holds no lock, so a stage may read too.
    """
    lock = FileLock(HELD, timeout=5)
    with contextlib.suppress(OSError):
        if HELD.parent.is_dir():
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def lock_entries(text: str) -> dict[str, str]:
    """The entries of a dvc.lock, by the name of their stage, as text: most are never asked for, and to parse all takes long."""
    return {entry.partition(":\n")[0].strip(): entry for entry in re.split(r"^(?=  [^\s#])", text, flags=re.MULTILINE)[1:]}


def lock_of(entries: dict[str, str]) -> bytes:
    """A dvc.lock of these entries."""
    kept = "".join(entries.values()).encode()
    return LOCK_STARTS + kept if kept else LOCK_STARTS.rstrip() + b" {}\n"


def recorded(entries: dict[str, str], stage: str) -> dict[str, Any]:
    """What dvc.lock says of a stage; nothing where it does not know it. Raises UserError where it is damaged."""
    entry = params.parse_yaml(entries.get(stage, ""), LOCK)
    with sound(LOCK):
        found = dict(entry[stage]) if entry else {}
        for item in (*found.get("deps", []), *found.get("outs", [])):
            item["path"], item["md5"]
        return found


def refuse_conflict(content: bytes) -> None:
    """Raises UserError where a dvc.lock holds two texts at once."""
    if re.search(rb"^(<<<<<<<|>>>>>>>) ", content, re.MULTILINE):
        raise UserError(f"{LOCK} has conflict markers of git; `git checkout --ours {LOCK}`, then `dvc repro`")


def is_cut(content: bytes) -> bool:
    """Whether a dvc.lock begins as DVC writes it, or holds nothing, or zeros: a crash may leave these."""
    start = content.replace(b"\r\n", b"\n")[: len(LOCK_STARTS)]
    return b"\0" in content or not content.strip() or LOCK_STARTS.startswith(start)


def whole_entries(content: bytes) -> dict[str, str]:
    """Those entries of a dvc.lock that a cut left whole; the last is none of them, for it may look whole."""
    rest = lock_entries(content.decode(errors="surrogateescape").replace("\r\n", "\n"))
    if rest:
        rest.popitem()
    return {name: entry for name, entry in rest.items() if _is_whole(entry)}


def ends_in_a_part(content: bytes) -> bool:
    """Whether the last entry of a dvc.lock was cut off where DVC still reads it: a file without its MD5, say."""
    entries = list(lock_entries(content.decode(errors="surrogateescape").replace("\r\n", "\n")).values())
    return bool(entries) and not _is_whole(entries[-1])


def _is_whole(entry: str) -> bool:
    with contextlib.suppress(UserError, ValueError, LookupError, AttributeError, TypeError):
        ((_, stage),) = params.parse_yaml(entry, LOCK).items()
        files = [*stage.get("deps", []), *stage.get("outs", [])]
        return bool(stage["cmd"]) and all(file["path"] and file["md5"] for file in files)
    return False


def working(listed: Any) -> tuple[dict[str, Who], dict[str, list[Who]]]:
    """Who writes and who reads each path, by DVC's list. Raises ValueError, or the like, where it has another form."""
    write, read = listed.get("write", {}), listed.get("read", {})
    lists = [who for who in read.values() if isinstance(who, list)]
    known = listed.keys() <= {"write", "read"} and len(lists) == len(read)
    if not known or not all(
        who.keys() == {"pid", "cmd"} and isinstance(who["pid"], int) and isinstance(who["cmd"], str)
        for who in [*write.values(), *itertools.chain(*lists)]
    ):
        raise ValueError("not as DVC writes it")
    return write, read


def is_recorded(
    stages: dict[str, Stage], lock: dict[str, str], cell: params.Cell, loaded: params.Params, *, before: str | None = None
) -> bool:
    """Whether a cell's files come from the code, the parameters and the data that are here now: `dvc status` for it alone.

    Args:
        stages: those that lead to the cell's scores, in order.
        lock: entries of dvc.lock.
        before: a stage; it and those after it do not count.
    """
    made: dict[str, str] = {}
    values = loaded.model_dump()
    for name, stage in itertools.takewhile(lambda item: item[0] != before, stages.items()):
        item = paths.item_of(stage, str(cell))
        entry = recorded(lock, paths.stage_name(name, item))
        locked = {dep["path"]: dep["md5"] for dep in entry.get("deps", [])}
        if (entry.get("params") or {}).get("params.yaml") != params_of(stage, item, loaded):
            return False
        if locked.keys() != set(paths.deps(stage, item, values)):
            return False
        if any(digest != (made.get(path) or md5(Path(path))) for path, digest in locked.items()):
            return False
        made |= {out["path"]: out["md5"] for out in entry.get("outs", [])}
    scores = paths.scores("evaluate", str(cell))
    return before is not None or made.get(str(scores)) == md5(scores)


def params_of(stage: Stage, item: str, loaded: params.Params) -> dict[str, Any]:
    """The values of a stage's entries under `params`, by dotted name, as DVC records them for one of its items."""
    values = loaded.model_dump(exclude_unset=True)  # as the file has it: what it leaves out DVC does not see
    return {name: _at(values, name) for name in (paths.of_item(entry, item) for entry in stage["params"])}


def _at(values: dict[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        values = values[part]
    return values
