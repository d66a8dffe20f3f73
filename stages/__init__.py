"""The stages of the pipeline. Every module directly in this folder is one DVC stage; everything else lives one level down."""

import importlib.util
import sys

if not all(importlib.util.find_spec(name) for name in ("pydantic", "torch", "safetensors")):
    sys.exit(
        f"naqsh: {sys.executable} is not the project's environment. Run `make repro`, or `. .venv/bin/activate` before `dvc repro`."
    )


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: shown as one line, without a traceback, exit code 1."""
