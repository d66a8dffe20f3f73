"""One file, however large, from the web or from Google Drive: streamed to disk, and checked by its SHA-256."""

import hashlib
import queue
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from stages.errors import UserError

TIMEOUT = 30.0  # seconds without an answer, or without a further byte, after which a server counts as dead
SLOWEST = 20_000  # bytes per second below which a download counts as stalled
LARGEST = 64 * 2**30  # bytes; whatever is larger is not the file that was meant


def download(target: Path, *, url: str | None, drive: str | None, sha256: str | None) -> None:
    """Fetch one file, whole or not at all. Proxies are those of the environment.

    Args:
        url: its address, http or https; or
        drive: the id of a file on Google Drive that everyone with the link may see, or the link.
        sha256: of the file, in hexadecimal. None: nothing is kept, and the error tells the one of what came.

    Raises:
        UserError: not exactly one of url and drive is given, or one that cannot be right; the server cannot be reached, refuses,
            stalls or breaks off; a web page came, or another file than `sha256` says, or one larger than LARGEST; or the file
            cannot be written.
    """
    label = _checked(url, drive, sha256)
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as file:
            digest = _transfer(file, label, url, drive)
        if sha256 is None or digest != sha256.lower():
            raise UserError(f"{label}: {_why_refused(part, digest, sha256)}")
        part.replace(target)
    except OSError as error:
        raise UserError(f"{label}: writing it to {target}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def _checked(url: str | None, drive: str | None, sha256: str | None) -> str:
    """What errors call the file. Raises UserError when what is asked for cannot be right."""
    if (url is None) == (drive is None):
        raise UserError(f"{'neither' if url is None else 'both'} of url and drive given; one of them must say where the file is")
    label = f"drive = {drive}" if url is None else f"url = {url}"
    if url is not None and not _is_web_address(url):
        raise UserError(f"{label} is no address on the web; it must be https://HOST/FILE or http://HOST/FILE")
    if drive is not None and not re.fullmatch(r"[-\w]+|https://(drive|docs)\.google\.com/\S+", drive):
        raise UserError(
            f"{label} is neither the id of a file on Google Drive nor its link, https://drive.google.com/file/d/ID/view"
        )
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UserError(f"{label}: sha256 = {sha256} is no SHA-256; it must be 64 hexadecimal digits")
    return label


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool((parts.hostname or "").encode("idna"))
    except ValueError:  # brackets of IPv6, or an empty or endless part of a name
        return False


def _transfer(file: BinaryIO, label: str, url: str | None, drive: str | None) -> str:
    """The SHA-256 of all that came, which is in the file then."""
    import gdown  # all three are slow to import, and needed nowhere else
    import requests
    from gdown.download import CHUNK_SIZE  # bytes between two reports

    digest = hashlib.sha256()
    link = drive if drive is not None and "://" in drive else url
    bar = tqdm(desc="download", unit="B", unit_scale=True, disable=None, leave=False)
    with bar, _watchdog(TIMEOUT + CHUNK_SIZE / SLOWEST) as (stalled, go_on):

        def report(done: int, total: int | None) -> None:
            go_on()
            if max(done, total or 0) > LARGEST:
                raise UserError(f"{label} has more than {LARGEST} bytes, so it is not a file to expect; is the address right?")
            bar.total = total
            bar.update(done - bar.n)

        try:
            gdown.download(
                url=link,
                id=None if link else drive,
                output=file,
                quiet=True,
                use_cookies=False,
                user_agent="naqsh" if drive is None else None,  # None: a browser, to which other hosts than Drive send pages
                hasher=digest,
                progress=report,
                timeout=TIMEOUT,
                cancel=stalled,
            )
        except gdown.DownloadCancelled:
            raise UserError(f"{label}: stalled: fewer than {SLOWEST} bytes per second came") from None
        except (gdown.DownloadError, requests.RequestException) as error:
            page = "a web page came, not the file: " if isinstance(error, gdown.FileURLRetrievalError) else ""
            reason = getattr(error.args[0], "reason", error) if error.args else error  # without "Max retries exceeded"
            raise UserError(f"{label}: {page}{' '.join(str(reason).split()) or type(error).__name__}") from None
    return digest.hexdigest()


@contextmanager
def _watchdog(seconds: float) -> Iterator[tuple[threading.Event, Callable[[], None]]]:
    """An event, set once so many seconds pass without a call of the function.

    A socket's time limit is for one wait: a server that drips keeps within it for ever.
    """
    calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
    late = threading.Event()

    def watch() -> None:
        try:
            while calls.get(timeout=seconds):
                pass
        except queue.Empty:
            late.set()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield late, lambda: calls.put(True)
    finally:
        calls.put(False)


def _why_refused(part: Path, digest: str, sha256: str | None) -> str:
    with part.open("rb") as file:
        start = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<") and re.search(b"<(!doctype html|html|head|body|script)", start):
        return "a web page came, not the file; a browser shows whether it wants a login or has another address for the download"
    came = f"what came has {part.stat().st_size} bytes and the SHA-256 {digest}"
    return f"{came}, not {sha256}" if sha256 else f"sha256 is missing; {came}: put that in if it is the file that you mean"
