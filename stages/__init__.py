"""The stages of the pipeline. Every module directly in this folder is one DVC stage; everything else lives one level down."""

import getpass
import importlib.util
import os
import re
import signal
import sys

if not all(importlib.util.find_spec(name) for name in ("pydantic", "torch", "safetensors")):
    sys.exit(
        f"naqsh: {sys.executable} is not the project's environment. Run `make repro`, or `. .venv/bin/activate` before `dvc repro`."
    )

try:
    getpass.getuser()
except (KeyError, OSError):  # a user without a name, as in a container: DVC and torch ask for one, and fail without it
    os.environ["LOGNAME"] = f"user-{os.getuid()}"

if "DVC_STAGE" in os.environ:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, until the stage has a way of its own
    from stages.pipeline import inputs  # noqa: F401  # before all that a stage is made of is imported

if "NAQSH_WARM" in os.environ and sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith("stages."):
    from stages.pipeline import warm  # imports little

    code = warm.ask(sys.orig_argv[2], sys.orig_argv[3:])
    if code is not None:
        sys.exit(code)


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
