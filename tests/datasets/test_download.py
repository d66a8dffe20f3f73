"""Downloads: every way in which one can fail, against a server on 127.0.0.1; Google Drive by a server that plays it."""

import hashlib
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import gdown
import pytest
import requests

from stages.datasets import download as module
from stages.datasets.download import download
from stages.errors import UserError

CONTENT = bytes(range(256)) * 5000  # more than two of gdown's chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = "0" * 64
OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK + b"Content-Length: %d\r\n\r\n%b" % (len(CONTENT), CONTENT)
ID = "1a-B_2c3D4e5F6g7H8i9J0kLmNoPqRsTu"


class Server(socketserver.ThreadingTCPServer):
    """A server on 127.0.0.1 that sends the parts of an answer, as they come; `answers` has them by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self.answers: dict[str, Iterable[bytes]] = {}
        self.asked: list[str] = []
        self.over = threading.Event()

    def silent(self) -> Iterator[bytes]:
        """Nothing, until the test is over."""
        self.over.wait()
        yield from ()


class Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        path = self.rfile.readline().split()[1].decode()
        while self.rfile.readline().strip():
            pass
        self.server.asked.append(path)
        with suppress(OSError):  # the client left
            for part in self.server.answers[path]:
                self.wfile.write(part)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience of 0.3 s for one wait, and of 0.8 s for one of gdown's chunks."""
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    monkeypatch.setattr(module, "SLOWEST", 2**20)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw" / "archive.zip"


def refusal(target: Path, *, url: str | None = None, drive: str | None = None, sha256: str | None = SHA256) -> str:
    """The one line that a download ends with, having left nothing."""
    with pytest.raises(UserError) as caught:
        download(target, url=url, drive=drive, sha256=sha256)
    message = str(caught.value)
    assert "\n" not in message
    assert not list(target.parent.iterdir())
    return message


# What comes


def chunked(*parts: bytes) -> list[bytes]:
    return [OK + b"Transfer-Encoding: chunked\r\n\r\n", *(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)]


@pytest.mark.parametrize(
    "answer",
    [[WHOLE], [b"HTTP/1.0 200 OK\r\n\r\n", CONTENT], chunked(CONTENT[:1000], CONTENT[1000:], b"")],
    ids=["with its length", "until the server hangs up", "in chunks"],
)
def test_file_comes_whole_and_without_a_word(server, target, answer, capfd):
    server.answers["/a.zip"] = answer
    download(target, url=f"{server.url}a.zip", drive=None, sha256=SHA256.upper())
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert capfd.readouterr() == ("", "")


def test_redirect_is_followed(server, target):
    server.answers |= {
        "/a.zip": [b"HTTP/1.1 302 Found\r\nLocation: /b.zip\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"],
        "/b.zip": [WHOLE],
    }
    download(target, url=f"{server.url}a.zip", drive=None, sha256=SHA256)
    assert target.read_bytes() == CONTENT


def test_proxy_of_the_environment_is_used(server, target, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    server.answers["http://somewhere.invalid/a.zip"] = [WHOLE]
    download(target, url="http://somewhere.invalid/a.zip", drive=None, sha256=SHA256)
    assert target.read_bytes() == CONTENT


def test_other_file_is_refused_with_both_sums(server, target):
    server.answers["/a.zip"] = [WHOLE]
    said = f"url = {server.url}a.zip: what came has {len(CONTENT)} bytes and the SHA-256 {SHA256}, not {OTHER}"
    assert refusal(target, url=f"{server.url}a.zip", sha256=OTHER) == said


def test_without_a_sum_the_file_is_refused_with_the_one_it_has(server, target):
    server.answers["/a.zip"] = [WHOLE]
    assert re.search(f"sha256 is missing.*{SHA256}", refusal(target, url=f"{server.url}a.zip", sha256=None))


def test_a_failure_leaves_what_was_there_before(server, target):
    server.answers["/a.zip"] = [WHOLE]
    target.write_bytes(b"before")
    with pytest.raises(UserError, match=f"not {OTHER}"):
        download(target, url=f"{server.url}a.zip", drive=None, sha256=OTHER)
    assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == {"archive.zip": b"before"}


@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html>\n<html><title>Sign in</title>",
        b"\xef\xbb\xbf\r\n<HTML lang=en>",
        b"<?xml version='1.0'?>\n<!DOCTYPE html PUBLIC '-//W3C//DTD XHTML 1.0 Strict//EN'>",
        b"<!-- cached --><head><script>location = '/login'</script>",
    ],
)
@pytest.mark.parametrize("sha256", [SHA256, None])
def test_web_page_is_called_one(server, target, page, sha256):
    server.answers["/a.zip"] = [OK + b"Content-Length: %d\r\n\r\n%b" % (len(page), page)]
    assert "a web page came, not the file" in refusal(target, url=f"{server.url}a.zip", sha256=sha256)


def test_web_page_that_was_asked_for_is_a_file_like_others(server, target):
    server.answers["/a.html"] = [b"HTTP/1.0 200 OK\r\n\r\n<html>"]
    download(target, url=f"{server.url}a.html", drive=None, sha256=hashlib.sha256(b"<html>").hexdigest())
    assert target.read_bytes() == b"<html>"


@pytest.mark.parametrize("answer", [[WHOLE], chunked(*[CONTENT] * 9)], ids=["announced", "not announced"])
def test_too_large_a_file_is_given_up(server, target, answer, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 1_000_000)
    server.answers["/a.zip"] = answer
    assert "a.zip has more than 1000000 bytes" in refusal(target, url=f"{server.url}a.zip")


# The server


@pytest.mark.parametrize("status", ["403 Forbidden", "404 Not Found", "500 Internal Server Error"])
def test_refusing_server_is_quoted(server, target, status):
    server.answers["/a.zip"] = [f"HTTP/1.1 {status}\r\nContent-Length: 6\r\n\r\n<html>".encode()]
    code, _, words = status.partition(" ")
    assert re.search(f"{code}.*{words}", refusal(target, url=f"{server.url}a.zip"))


@pytest.mark.parametrize(
    "answer",
    [[WHOLE[:-1]], [WHOLE[:600_000]], [WHOLE[:100]], chunked(CONTENT)],
    ids=["a byte short", "half", "a few bytes", "in chunks"],
)
def test_cut_off_download_is_called_incomplete(server, target, answer):
    server.answers["/a.zip"] = answer
    assert "incomplete" in refusal(target, url=f"{server.url}a.zip")


def test_nonsense_is_quoted(server, target):
    server.answers["/a.zip"] = [b"nonsense\r\n"]
    assert "nonsense" in refusal(target, url=f"{server.url}a.zip")


def test_silent_server_is_given_up(server, target, quick):
    server.answers["/a.zip"] = server.silent()
    assert "timed out" in refusal(target, url=f"{server.url}a.zip")


def test_stalled_server_is_given_up(server, target, quick):
    def stall() -> Iterator[bytes]:
        yield WHOLE[:600_000]
        yield from server.silent()

    server.answers["/a.zip"] = stall()
    assert "timed out" in refusal(target, url=f"{server.url}a.zip")


@pytest.mark.parametrize("start", [OK, OK + b"\r\n", WHOLE[:600_000]], ids=["in the head", "from the start", "after half"])
def test_dripping_server_is_given_up_although_every_wait_is_short(server, target, quick, start):
    def drip() -> Iterator[bytes]:
        yield start
        while not server.over.wait(0.05):
            yield b"X: y\r\n"

    server.answers["/a.zip"] = drip()
    assert "stalled: fewer than 1048576 bytes per second" in refusal(target, url=f"{server.url}a.zip")


def test_slow_server_is_waited_for_although_it_takes_longer_than_the_patience_for_a_chunk(server, target, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 1.0)
    monkeypatch.setattr(module, "SLOWEST", 2**19)  # hence 2 s for a chunk, which takes 1.1; all take 2.6

    def slow() -> Iterator[bytes]:
        for at in range(0, len(WHOLE), 100_000):
            time.sleep(0.2)
            yield WHOLE[at : at + 100_000]

    server.answers["/a.zip"] = slow()
    download(target, url=f"{server.url}a.zip", drive=None, sha256=SHA256)
    assert target.read_bytes() == CONTENT


def test_refused_connection_unknown_host_and_dead_proxy_are_named(target, monkeypatch):
    assert "Failed to resolve 'nothing.invalid'" in refusal(target, url="http://nothing.invalid/a.zip")
    with socket.socket() as bound:  # but never listening
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        assert "Connection refused" in refusal(target, url=url)
        monkeypatch.setenv("http_proxy", url)
        assert re.search("proxy.*Connection refused", refusal(target, url="http://nothing.invalid/a.zip"))


# What is asked for


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "neither of url and drive given"),
        ({"url": "http://a/b", "drive": ID}, "both of url and drive given"),
        ({"url": "ftp://a/b.zip"}, "url = ftp://a/b.zip is no address on the web"),
        ({"url": "/home/a/b.zip"}, "is no address on the web"),
        ({"url": "https://"}, "is no address on the web"),
        ({"url": "http://[::1/a.zip"}, "is no address on the web"),
        ({"url": "http://a..b/a.zip"}, "is no address on the web"),
        ({"drive": "my file.zip"}, "drive = my file.zip is neither the id of a file on Google Drive nor its link"),
        ({"drive": "https://example.org/a.zip"}, "nor its link, https://drive.google.com/file/d/ID/view"),
        ({"url": "http://a/b", "sha256": "1234"}, "sha256 = 1234 is no SHA-256; it must be 64 hexadecimal digits"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_sent(target, asked, says, monkeypatch):
    monkeypatch.setattr(gdown, "download", lambda **_: pytest.fail("was sent"))
    assert says in refusal(target, **asked)


# The disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("content", [CONTENT, CONTENT[:10]], ids=["as it comes", "at the end"])
def test_full_disk_is_named(server, target, content):
    server.answers["/a.zip"] = [b"HTTP/1.0 200 OK\r\n\r\n", content]
    target.with_name(".archive.zip.part").symlink_to("/dev/full")
    assert f"writing it to {target}: No space left on device" in refusal(target, url=f"{server.url}a.zip")


def test_missing_folder_is_named(server, target):
    target.parent.rmdir()
    with pytest.raises(UserError, match=f"{target}: No such file or directory"):
        download(target, url=server.url, drive=None, sha256=SHA256)


# Google Drive


@pytest.fixture
def drive(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server in the place of Google Drive."""
    get: Callable[..., requests.Response] = requests.Session.get

    def elsewhere(session: requests.Session, url: str, **options: object) -> requests.Response:
        return get(session, re.sub(r"https://drive(\.usercontent)?\.google\.com/", server.url, url), **options)

    monkeypatch.setattr(requests.Session, "get", elsewhere)
    return server


FILE = [OK, b'Content-Type: application/zip\r\nContent-Disposition: attachment; filename="../x.zip"\r\n', WHOLE.partition(OK)[2]]


def page(content: str) -> list[bytes]:
    return [OK, b"Content-Type: text/html\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content.encode())]


@pytest.mark.parametrize(
    "name", [ID, f"https://drive.google.com/file/d/{ID}/view?usp=sharing", f"https://drive.google.com/open?id={ID}"]
)
def test_drive_gives_a_file_by_its_id_or_link(drive, target, name, capfd):
    drive.answers[f"/uc?id={ID}"] = FILE
    download(target, url=None, drive=name, sha256=SHA256)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert capfd.readouterr() == ("", "")


def test_drive_gives_a_large_file_after_its_question(drive, target):
    drive.answers[f"/uc?id={ID}"] = page(
        '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
        f'<input type="hidden" name="id" value="{ID}"><input type="hidden" name="confirm" value="t"></form>'
    )
    drive.answers[f"/download?id={ID}&confirm=t"] = FILE
    download(target, url=None, drive=ID, sha256=SHA256)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>',
            "Too many users have viewed",
        ),
        ("<html><title>Sign in - Google Accounts</title></html>", "permission to 'Anyone with the link'"),
    ],
    ids=["quota", "login"],
)
def test_page_of_drive_is_called_one_and_quoted(drive, target, content, says):
    drive.answers[f"/uc?id={ID}"] = page(content)
    said = refusal(target, drive=ID)
    assert said.startswith(f"drive = {ID}: a web page came, not the file: ")
    assert says in said


def test_page_in_the_place_of_the_link_of_a_folder_is_called_one(drive, target):
    drive.answers[f"/drive/folders/{ID}"] = page("<!doctype html><html>")
    assert "a web page came, not the file" in refusal(target, drive=f"https://drive.google.com/drive/folders/{ID}")


def test_other_file_of_drive_is_refused(drive, target):
    drive.answers[f"/uc?id={ID}"] = FILE
    assert f"SHA-256 {SHA256}, not {OTHER}" in refusal(target, drive=ID, sha256=OTHER)


@pytest.mark.parametrize("error", [gdown.FileURLRetrievalError, gdown.DownloadError, requests.ConnectionError])
def test_what_gdown_raises_is_one_line(target, error, monkeypatch):
    def fail(**_: object) -> None:
        raise error("cannot:\n\n\tbe had")

    monkeypatch.setattr(gdown, "download", fail)
    assert refusal(target, drive=ID).endswith("cannot: be had")


@pytest.mark.parametrize("url", ["http://me:hunter2@127.0.0.1:1/x?token=abc123", "ftp://me:hunter2@host/x?token=abc123"])
def test_no_password_is_told(tmp_path, url):
    with pytest.raises(UserError) as refused:
        download(tmp_path / "x.zip", url=url, drive=None, sha256=None)
    assert "***@" in str(refused.value)
    assert "hunter2" not in str(refused.value)
    assert "abc123" not in str(refused.value)
