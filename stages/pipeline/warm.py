"""Stages that start at once: a process with the heavy libraries imported, of which every stage of one command is a fork.

    python -m stages.pipeline.warm dvc repro

While the command runs, `python -m stages.NAME` below it need not import torch and MLflow again: `ask` sends arguments, environment
and open files here, passes signals on and brings the exit code back. A fork imports the project's own code anew. Without this
process, or without Linux, stages start as any program does, to the same results.
"""

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

ADDRESS = "NAQSH_WARM"  # the environment variable with the path of the socket
LIBRARIES = (  # that stages import, and what takes long of what these import later
    "torch", "torch._dynamo", "safetensors.torch", "scipy.special", "scipy.linalg", "pydantic", "PIL.Image", "ruamel.yaml",
    "mlflow.entities", "mlflow.store.tracking.sqlalchemy_store",
)  # fmt: skip


def main(command: list[str]) -> int:
    """Run a command, and meanwhile fork a stage for each that asks; its exit code."""
    if sys.platform != "linux":
        return subprocess.call(command)
    with tempfile.TemporaryDirectory(prefix="naqsh-") as folder, socket.socket(socket.AF_UNIX) as listener:  # nobody else may enter
        listener.bind(f"{folder}/socket")
        listener.listen()
        child = subprocess.Popen(command, env={**os.environ, ADDRESS: f"{folder}/socket"})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command; this process ends with it
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        ended, askers = os.pidfd_open(child.pid), dict[ForkProcess, socket.socket]()
        while True:
            waited_for: list[Any] = [listener, ended, *askers.values(), *(fork.sentinel for fork in askers)]
            ready = select.select(waited_for, [], [])[0]
            for fork, asker in list(askers.items()):
                if fork.sentinel in ready:
                    fork.join()
                    code = fork.exitcode or 0
                    with contextlib.suppress(OSError), askers.pop(fork):
                        asker.send(bytes([code if code >= 0 else 128 - code]))
                elif asker in ready:
                    number = asker.recv(1)
                    os.kill(fork.ident or 0, number[0] if number else signal.SIGKILL)  # who asked is gone: so is the fork
            if ended in ready:
                for fork in askers:  # of a command that was killed
                    fork.terminate()
                return child.wait()
            if listener in ready:
                asker = listener.accept()[0]
                files = socket.recv_fds(asker, 1, 3)[1]
                with asker.makefile() as text:
                    request = json.loads(text.readline())
                for name in LIBRARIES:
                    importlib.import_module(name)
                fork = ForkProcess(target=_become, args=[files], kwargs=request)
                fork.start()
                askers[fork] = asker
                for file in files:
                    os.close(file)


def _become(files: list[int], module: str, arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Run a module in this fork as `python -m` does; the terminal's Ctrl-C comes by way of who asked, as all signals do."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[0], sys.argv = cwd, [module, *arguments]
    for name in [name for name in sys.modules if name.partition(".")[0] == "stages"]:
        del sys.modules[name]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def ask(module: str, arguments: list[str]) -> int | None:
    """Have a module run as a fork of the process that listens at ADDRESS; its exit code, or None where nobody does."""
    environment = dict(os.environ)
    asker = socket.socket(socket.AF_UNIX)
    try:
        asker.connect(environment.pop(ADDRESS))
    except OSError:
        return None
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asker.send(bytes([number])) and None)
    socket.send_fds(asker, [b"\n"], [0, 1, 2])
    asker.sendall(
        json.dumps({"module": module, "arguments": arguments, "cwd": str(Path.cwd()), "environment": environment}).encode() + b"\n"
    )
    code = asker.recv(1)
    return code[0] if code else 1


def end_with_parent() -> None:
    """Get a SIGTERM when the parent is killed, on Linux, so that no orphan goes on writing."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
