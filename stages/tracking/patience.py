"""How long the MLflow store may hold up the work: 10 s in all for one `make repro`, whatever a server does.

A use of the store runs in a thread. Who waits for it gives up when one call takes too long. What was waited for is kept in
.state/store.json, so that the next stage does not wait for the same store again.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stages.errors import UserError, masked
from stages.pipeline.dvc_forms import workspace
from stages.pipeline.files import whole_file

# All in seconds.
BUDGET = 10.0  # of waiting, for one `make repro` or one process
CALL = 5.0  # for one call
ASKED = 10.0  # for one call when a person asked for it
QUICK = 1.0  # a call that took longer counts as waiting
PAUSE, RETRY = 60.0, 1.0  # a store that was down is left alone for so long; the next try may take so long
LOCAL = 60.0  # for what this machine's own disk and processor do: not waiting for a server
UPGRADE = 1800.0  # for the upgrade of a local database, however many runs it holds

_PROCESS = uuid.uuid4().hex


class DownError(UserError):
    """The store does not answer, or did not a short time ago."""


class BusyError(UserError):
    """Another process of this workspace uses the store, which may be well."""


class Watch:
    """Times the calls of one use of the store."""

    def __init__(self, uri: str, call: float = math.inf, total: float = math.inf) -> None:
        """`call`: seconds for one call; `total`: seconds of waiting in all, where slow answers count too."""
        self._name, self._call, self._total = masked(uri), call, total
        self._under_way: tuple[float, float] | None = None  # when the present call began, and how long it may take
        self._failed = 0.0  # seconds of the last call, where it failed
        self.given_up = False
        self.waited = 0.0

    def limit(self) -> float:
        """Seconds that the next call may take."""
        return max(min(self._call, self._total - self.waited), 0.0)

    def call(self, function: Callable[..., Any], *arguments: Any, may_take: float | None = None, **named: Any) -> Any:
        """What a function returns. `may_take`: its own limit, within which it does not count as waiting."""
        if self.given_up:
            raise DownError(f"{self._name} was given up")
        begun = time.monotonic()
        self._under_way = begun, self.limit() if may_take is None else may_take
        try:
            returned = function(*arguments, **named)
        except Exception:
            self._failed = time.monotonic() - begun
            raise
        finally:
            self._under_way = None
        if may_take is None and self._total < math.inf and (took := time.monotonic() - begun) > QUICK:
            self.waited += took
        return returned

    def under_way(self) -> float:
        """Seconds since the present call began; 0 where there is none."""
        under_way = self._under_way
        return time.monotonic() - under_way[0] if under_way else 0.0

    def is_late(self) -> bool:
        """Whether the present call takes longer than it may."""
        under_way = self._under_way
        return under_way is not None and time.monotonic() - under_way[0] > under_way[1]

    def late(self) -> DownError:
        """What to say when the present call is given up."""
        return DownError(f"{self._name} did not answer in {self.waited + self.under_way():.0f} s")

    def give_up(self) -> float:
        """Refuse every further call. Returns the seconds that were waited for, the call that failed or hangs among them."""
        self.given_up = True
        return self.waited + (self.under_way() or self._failed)

    def run(self, work: Callable[[], Any]) -> Any:
        """What `work` returns or raises, in a thread of its own. Raises DownError when a call is late; the thread ends with it."""
        returned: list[Any] = []
        raised: list[BaseException] = []

        def run() -> None:
            try:
                returned.append(work())
            except BaseException as error:  # raised again below, where it is waited for
                raised.append(error)

        thread = threading.Thread(target=run, daemon=True)  # the interpreter does not wait for it
        thread.start()
        while thread.is_alive():
            thread.join(0.02)
            if self.is_late() and thread.is_alive():
                raise self.late()
        if raised:
            raise raised[0]
        return returned[0]


@dataclass(frozen=True)
class _Past:
    """What is known of a store from earlier uses."""

    store: str  # a hash: the address may hold a password
    budget: str  # whose seconds `waited` are
    waited: float = 0.0
    down: str = ""  # why, where it was found down
    tried: float = 0.0  # when


@contextlib.contextmanager
def watch(uri: str, *, asked: bool = False) -> Iterator[Watch]:
    """A watch for one use of a store; an error inside means that this use failed.

    Args:
        uri: of the store.
        asked: a person asked for it. A store that was down is tried at once; one that answers, though slowly, may take its time.
            So may a local database, of which only failures count. Outside `make repro` there is no budget.

    Raises DownError where the store was down less than a minute ago, or no time is left to wait.
    """
    past = _recall(uri)
    alone = asked and not os.environ.get("NAQSH_REPRO")
    left = BUDGET - past.waited
    free = alone or (not past.down and (asked or uri.startswith("sqlite")))
    if not free and (left <= 0 or (past.down and not asked and 0 <= time.time() - past.tried < PAUSE)):
        raise DownError(past.down or f"{masked(uri)} was waited for long enough")
    call = ASKED if alone else min(CALL, max(left, RETRY))
    watch = Watch(uri, call, math.inf if free else min(left, RETRY) if past.down else left)
    try:
        yield watch
    except BusyError:
        raise
    except Exception as error:
        note(uri, watch.give_up(), reason(error))
        raise
    if past.down or watch.waited:
        _write(replace(past, waited=past.waited + watch.waited, down=""))


def note(uri: str, waited: float, why: str) -> None:
    """Remember seconds that were waited for in vain, and why. The store counts as down where they were noticeable."""
    if waited > 0.1:
        past = _recall(uri)
        down = (why, time.time()) if waited > 0.5 else (past.down, past.tried)
        _write(replace(past, waited=past.waited + waited, down=down[0], tried=down[1]))


def reason(error: BaseException) -> str:
    """An error as one line, without the name and the password that an address may hold."""
    name, text = type(error).__name__, str(error).strip()
    if cause := re.search(r"API request to (\S+)/api/.*Caused by \w+\([\"'](?:\w+\(.*?\): )?(.*)[\"']\)", text):
        text = f"{cause[1]}: {cause[2]}"  # the rest tells of libraries
    if isinstance(error, ImportError):
        text += "; install it, or change MLFLOW_TRACKING_URI"
    elif not text or isinstance(error, LookupError | AttributeError | TypeError):  # of which the text alone says little
        text = f"{name}: {text}"
    return masked(text.splitlines()[0])


def left(uri: str) -> float:
    """Seconds that may still be waited for a store."""
    return max(BUDGET - _recall(uri).waited, 0.0)


def _path() -> Path:
    return workspace() / ".state" / "store.json"


def _recall(uri: str) -> _Past:
    store, budget = hashlib.sha256(uri.encode()).hexdigest(), os.environ.get("NAQSH_REPRO") or _PROCESS
    try:
        past = _Past(**json.loads(_path().read_text(encoding="utf-8")))
        past = replace(past, waited=float(past.waited), tried=float(past.tried), down=str(past.down))
        if past.store == store:
            return past if past.budget == budget else replace(past, budget=budget, waited=0.0)
    except (OSError, ValueError, TypeError):  # none yet, or not one
        pass
    return _Past(store, budget)


def _write(past: _Past) -> None:
    with contextlib.suppress(OSError), whole_file(_path()) as temporary:
        temporary.write_text(json.dumps(asdict(past)), encoding="utf-8")
