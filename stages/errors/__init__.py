"""What can go wrong through no fault of the code, each told in one line; secrets in it are masked."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAME = r"(?:token|secret|passw(?:or)?d|passphrase|pwd|api[_-]?key|access[_-]?key|private[_-]?key|credential|authorization)"
_SECRETS = (
    # user:password@ of a URL, also where the password holds a slash; and without a scheme.
    (re.compile(r"(://)(?:[^\s/?#]{0,256}|[^\s/:?#]{1,256}:[^\s?#]{0,256})@"), r"\1***@"),
    (re.compile(r"(?<![\w.+/-])[\w.+-]{1,64}:[^\s@:/]{1,256}@(?=\w)"), "***@"),
    # What a URL says behind ?, & or # under a name that sounds secret.
    (
        re.compile(
            r"([?&#;][\w.%-]{0,40}(?:token|secret|passw|pwd|key|sig|signature|credential|auth)[\w.%-]{0,20}=)[^\s&#'\"]*[^\s&#'\":,;.)]",
            re.I,
        ),
        r"\1***",
    ),
    # name: value, name = value.
    (
        re.compile(
            rf"({_NAME}[\w-]{{0,40}}[\"']?[ \t]{{0,9}}[:=]{{1,2}}[ \t]{{0,9}}(?:(?:bearer|basic) |))"
            r"""(?!(?:null|none|true|false|str|int|bearer|basic)\b|\*\*\*)("[^"\n]*+"?|'[^'\n]*+'?|[^\s"'(),;&\[\]{}]++(?!\())""",
            re.I,
        ),
        r"\1***",
    ),
    # What is known by its form.
    (
        re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\b(?:gh[opsu]_|github_pat_|glpat-|hf_|sk-|xox[abprs]-|AIza|eyJ)[\w.-]{20,}"),
        "***",
    ),
    (re.compile(r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----).*?(-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.S), r"\1***\2"),
)


def masked(text: str) -> str:
    """The text with *** in place of what looks like a secret: passwords in URLs, tokens, keys."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: shown as one line, without a traceback, exit code 1.

    Secrets in it are masked.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(masked(str(message)))


class ChangedError(UserError):
    """What a stage is made of changed while it ran: DVC would record the new beside a result of the old."""


class Held(dict[str, Any]):
    """What a file holds by name; a name that is missing is told as damage to the file, in one line."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise damaged(self._path, f"it has no {name!r}")


def damaged(path: Path, why: Exception | str) -> UserError:
    """The error that tells of a damaged file, in one line."""
    reason = " ".join(f"{type(why).__name__}: {why}".split() if isinstance(why, KeyError) else str(why).split())
    restore = (
        f"`git checkout {path}`, or delete it and run `dvc repro`"
        if path.parts[:1] in (("metrics",), ("dvc.lock",))
        else "delete it and run `dvc repro`"
    )
    return UserError(f"{path} is damaged ({reason[:200]}); {restore}")


@contextlib.contextmanager
def sound(path: Path) -> Iterator[None]:
    """Tell, in one line, that the content of a file is not of the form that the block takes it for."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(path, error) from None


OF_THE_MACHINE = (  # what is wrong with it, not with the code: full, read-only, not allowed, too much open, broken, in the way
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO,
    errno.ENOLCK, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip


@contextlib.contextmanager
def in_one_line(who: str) -> Iterator[None]:
    """End the program with one line and exit code 1 where a mistake of the user or trouble of the machine ends the block.

    Where who reads its output has enough, as `head` has, it ends silently, with the exit code that a shell gives for SIGPIPE.
    """
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()  # what waits to be written may find the pipe closed too
    except UserError as error:
        sys.exit(f"{who}: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at the end
        sys.exit(141)
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"{who}: {where}{error.strerror}. When that is mended, run the same command again: it goes on from here")
