"""The stages of the pipeline. Every module directly in this folder is one DVC stage; everything else lives one level down."""

import getpass
import importlib.util
import os
import re
import signal
import sys

program = sys.orig_argv[2] if sys.orig_argv[1:2] == ["-m"] else ""
needed = ("torch", "safetensors", *(["pydantic"] if program.startswith("stages.") else []))  # who draws from Python needs no more

if not all(importlib.util.find_spec(name) for name in needed):
    sys.exit(
        f"naqsh: {sys.executable} is not the project's environment. Run `make repro`, or `. .venv/bin/activate` before `dvc repro`."
    )

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of numpy and scipy, before they are imported: bits depend on no number of cores

try:
    getpass.getuser()
except (KeyError, OSError):  # a user without a name, as in a container: DVC and torch ask for one, and fail without it
    os.environ["LOGNAME"] = f"user-{os.getuid()}"

if "DVC_STAGE" in os.environ:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, until the stage has a way of its own
    from stages.pipeline import inputs  # noqa: F401  # before all that a stage is made of is imported

if os.environ.get("NAQSH_WARM", "0") != "0" and re.fullmatch(r"stages\.\w+", program):
    from stages.sweep import warm  # imports little

    code = warm.ask(program, sys.orig_argv[3:])
    if code is not None:
        sys.exit(code)
