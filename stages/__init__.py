"""The stages of the pipeline. Every module directly in this folder is one DVC stage; everything else lives one level down."""

import importlib.util
import os
import signal
import sys

if not all(importlib.util.find_spec(name) for name in ("pydantic", "torch", "safetensors")):
    sys.exit(
        f"naqsh: {sys.executable} is not the project's environment. Run `make repro`, or `. .venv/bin/activate` before `dvc repro`."
    )

if "DVC_STAGE" in os.environ:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, until the stage has a way of its own
    from stages.pipeline import inputs  # noqa: F401  # before all that a stage is made of is imported

if "NAQSH_WARM" in os.environ and sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith("stages."):
    from stages.pipeline import warm  # imports the standard library alone

    code = warm.ask(sys.orig_argv[2], sys.orig_argv[3:])
    if code is not None:
        sys.exit(code)


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: shown as one line, without a traceback, exit code 1."""


class ChangedError(UserError):
    """What a stage is made of changed while it ran: DVC would record the new beside a result of the old."""
