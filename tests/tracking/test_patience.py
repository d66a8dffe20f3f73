"""What a store that hangs, drips, refuses or cannot be used costs the work: a line and a few seconds, once."""

import contextlib
import hashlib
import json
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from cells import CELL, followed, publish, runs

from stages.pipeline import grids, paths
from stages.tracking import mirror, patience, store
from stages.tracking.patience import DownError, Watch

GENEROUS = 30  # seconds on a busy machine for what takes 5; the old behaviour was minutes, or no end


class Server(ThreadingHTTPServer):
    """A server on this machine that does with a request what `answer` says."""

    daemon_threads = True

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        def do(handler: BaseHTTPRequestHandler) -> None:
            with contextlib.suppress(OSError):  # the client went away
                answer(handler)

        handler = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": do, "do_POST": do, "log_message": lambda *_: None})
        super().__init__(("127.0.0.1", 0), handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def say_nothing(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(600)


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.2)


def fail(handler: BaseHTTPRequestHandler) -> None:
    handler.send_error(500)


def answer_with(text: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    return answer


@contextlib.contextmanager
def bad_store(kind: str, tree: Path) -> Iterator[str]:
    """The address of a store with a fault."""
    servers = {"silent": say_nothing, "drips": drip, "fails": fail, "no JSON": answer_with(b"<html>"), "empty": answer_with(b"{}")}
    if kind in servers:
        server = Server(servers[kind])
        yield f"http://user:secret@127.0.0.1:{server.server_port}"
        server.shutdown()
    elif kind == "closed":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        yield f"http://user:secret@127.0.0.1:{port}"
    elif kind == "locked":
        with contextlib.closing(sqlite3.connect(tree / "mlflow.db", isolation_level=None)) as other:
            other.execute("begin exclusive")
            yield "sqlite:///mlflow.db"
    elif kind == "folder":
        (tree / "folder.db").mkdir(exist_ok=True)
        yield "sqlite:///folder.db"
    else:
        yield {"no driver": "postgresql+nothing://user:secret@host/x", "no address": "http://[bad", "no port": "http://host:99999"}[
            kind
        ]


SLOW, QUICK = ("silent", "drips", "locked"), ("fails", "no JSON", "empty", "closed", "folder", "no driver", "no address", "no port")


def follow() -> None:
    with followed(CELL):
        pass


USES: dict[str, Callable[[], object]] = {
    "publish": lambda: publish(CELL),
    "fail": lambda: mirror.fail([CELL], "no memory"),
    "sync": lambda: mirror.sync(),
    "Live": follow,
}


@pytest.mark.parametrize(
    ("kind", "first"), [*((kind, first) for kind in SLOW for first in USES), *((kind, "publish") for kind in QUICK)]
)
def test_a_bad_store_costs_a_line_and_its_budget_once(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, first: str
) -> None:
    monkeypatch.setattr(patience, "CALL", 1.0)
    with bad_store(kind, tree) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        began = time.monotonic()
        USES[first]()
        assert time.monotonic() - began < GENEROUS
        assert mirror.last_trouble()
        spent = patience._recall(store.uri()).waited
        assert spent < 3
        for use in USES.values():
            use()
        assert patience._recall(store.uri()).waited < spent + 0.5  # no second wait for a store that is known to be down
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1 + len(USES)
    assert all(re.fullmatch("MLflow: not recorded: .+; the files are kept, `make sync` catches up", line) for line in lines)
    assert "secret" not in said.err + said.out
    assert not said.out


def test_a_store_that_hangs_in_the_middle_ends_no_later(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that gave a store up ends at once, though a thread of it still waits."""
    server = Server(say_nothing)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    program = "from stages.tracking import mirror, patience\npatience.CALL = 0.5\nprint(mirror.sync())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60 + GENEROUS)
    server.shutdown()
    assert (done.returncode, done.stdout) == (0, "False\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_training_whose_store_hangs_later_is_not_held_up(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    picture = paths.weights(str(CELL.training)) / "previews" / "00000001.png"
    grids.save_png(picture, np.zeros((4, 4), np.uint8))
    hangs = threading.Event()
    monkeypatch.setattr(MlflowClient, "log_image", lambda *_, **__: hangs.set() or time.sleep(600))
    began = time.monotonic()
    with followed(CELL) as live:
        live.point({"step": 1, "train_loss": 0.9}, picture, 0.5, 1.0)
        assert hangs.wait(60)
    assert time.monotonic() - began < 60 + GENEROUS
    assert "did not answer" in (mirror.last_trouble() or "")
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert patience._recall(store.uri()).down
    (run,) = runs(tree)
    assert run.info.status == "RUNNING"


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the test turns on by itself, in a workspace of its own."""
    now = [1000.0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAQSH_REPRO", "first")
    for name in ("time", "monotonic"):
        monkeypatch.setattr(patience.time, name, lambda: now[0])
    return now


def use(clock: list[float], seconds: float, *, fails: bool = True, asked: bool = False, uri: str = "http://x") -> float | None:
    """Use a store, with one call of so many seconds; how long it might have taken, or None where it was not tried."""

    def wait() -> None:
        clock[0] += min(seconds, limit or 0)
        if fails:
            raise OSError("gone")

    limit = None
    with contextlib.suppress(OSError, DownError), patience.watch(uri, asked=asked) as watch:
        limit = watch.limit()
        watch.call(wait)
    return limit


def test_a_store_that_was_down_is_tried_once_a_minute_for_a_second(clock: list[float]) -> None:
    assert use(clock, 5) == patience.CALL == 5
    assert use(clock, 0) is None
    clock[0] += 59
    assert use(clock, 0) is None
    clock[0] += 1
    assert use(clock, 1) == 1
    assert use(clock, 0) is None
    clock[0] += 60
    assert use(clock, 0.1, fails=False) == 1
    assert use(clock, 0.1, fails=False) == 4  # it is up again; 6 of 10 seconds are spent
    assert patience.left("http://x") == 4


def test_one_repro_waits_ten_seconds_in_all_and_the_next_one_anew(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    waited = 0.0
    for _ in range(30):
        waited += use(clock, 5) or 0
        clock[0] += 60
    assert waited == patience.BUDGET == 10
    assert use(clock, 0, asked=True) is None
    monkeypatch.setenv("NAQSH_REPRO", "second")
    assert use(clock, 1) == 1
    assert use(clock, 1, asked=True) == 1  # who asked does not wait for the minute to end
    assert use(clock, 1, uri="http://y") == 5
    monkeypatch.delenv("NAQSH_REPRO")
    assert use(clock, 1, asked=True) == patience.ASKED


def test_only_slow_calls_of_a_store_that_works_count(clock: list[float]) -> None:
    for _ in range(100):
        assert use(clock, 0.9, fails=False) == 5
    assert use(clock, 4.9, fails=False) == 5
    assert use(clock, 4.9, fails=False) == 5
    assert use(clock, 0, fails=False) == pytest.approx(0.2)
    assert use(clock, 0.3, fails=False) == pytest.approx(0.2)


@pytest.mark.parametrize(("asked", "uri"), [(True, "http://x"), (False, "sqlite:////x.db")])
def test_a_local_or_an_asked_store_may_be_slow_but_not_fail(clock: list[float], asked: bool, uri: str) -> None:
    for _ in range(100):
        assert use(clock, 4.9, fails=False, asked=asked, uri=uri) == 5
    assert use(clock, 5, asked=asked, uri=uri) == 5
    assert use(clock, 1, asked=True, uri=uri) == 1
    assert use(clock, 0, uri=uri) is None
    assert patience.left(uri) == 4


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "x", '{"store": 1}', '{"other": 1}', '{"store": "S", "budget": "first", "waited": "long"}']
)
def test_a_broken_record_of_waiting_is_none(clock: list[float], text: str) -> None:
    patience._path().parent.mkdir()
    patience._path().write_text(text.replace("S", hashlib.sha256(b"http://x").hexdigest()))
    assert use(clock, 5) == 5
    assert json.loads(patience._path().read_text())["waited"] == 5


def test_a_late_call_ends_the_wait_and_no_other_call_follows() -> None:
    watch = Watch("http://x", 0.2)
    called: list[str] = []
    free = threading.Event()

    def work() -> None:
        watch.call(free.wait, 60)
        watch.call(called.append, "late")

    with pytest.raises(DownError, match="http://x did not answer"):
        watch.run(work)
    watch.give_up()
    free.set()
    time.sleep(0.3)
    assert not called
    assert Watch("http://x", 0.2).run(lambda: time.sleep(0.5) or 7) == 7  # what calls nothing may take its time


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("naqsh.cell"), "KeyError: 'naqsh.cell'"),
        (OSError("http://me:pa/ss@w@host:1/x is gone\nsecond line"), "http://***@host:1/x is gone"),
        (
            ModuleNotFoundError("No module named 'psycopg2'"),
            "No module named 'psycopg2'; install it, or change MLFLOW_TRACKING_URI",
        ),
        (OSError(), "OSError: "),
    ],
)
def test_a_reason_is_one_line_without_passwords(error: Exception, says: str) -> None:
    assert patience.reason(error) == says
