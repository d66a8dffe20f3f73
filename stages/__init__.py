"""The stages of the pipeline. Every module directly in this folder is one DVC stage; everything else lives one level down."""

import importlib.util
import os
import sys

if not all(importlib.util.find_spec(name) for name in ("pydantic", "torch", "safetensors")):
    sys.exit(
        f"naqsh: {sys.executable} is not the project's environment. Run `make repro`, or `. .venv/bin/activate` before `dvc repro`."
    )

if "NAQSH_WARM" in os.environ and sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith("stages."):
    from stages.pipeline import warm  # imports the standard library alone

    code = warm.ask(sys.orig_argv[2], sys.orig_argv[3:])
    if code is not None:
        sys.exit(code)


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: shown as one line, without a traceback, exit code 1."""
