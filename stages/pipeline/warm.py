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
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import psutil

ADDRESS = "NAQSH_WARM"  # the environment variable with the name of the socket
LIBRARIES = (  # that stages import, and what takes long of what these import later
    "torch", "torch._dynamo", "safetensors.torch", "scipy.special", "scipy.linalg", "pydantic", "PIL.Image", "ruamel.yaml",
    "mlflow.entities", "mlflow.store.tracking.sqlalchemy_store",
)  # fmt: skip
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR"}  # MLflow reads them when it is imported
PASSED_ON = (signal.SIGINT, signal.SIGTERM)
GRACE = 1.5  # seconds that a process has to end in good order


def main(command: list[str]) -> int:
    """Run a command, and meanwhile fork a stage for each that asks; its exit code.

    The socket has a name but no file, so that a kill leaves nothing behind; who asks must be the same user.
    """
    name = f"naqsh-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            os.close(os.pidfd_open(os.getpid()))
            listener.bind(f"\0{name}")
        except (AttributeError, OSError):  # no Linux, or an old one
            os.execvp(command[0], command)
        listener.listen()
        child = subprocess.Popen(command, env={**os.environ, ADDRESS: name}, preexec_fn=end_with_parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command; this process ends with it
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        ended, askers = os.pidfd_open(child.pid), dict[ForkProcess, socket.socket]()
        while True:
            waited_for: list[Any] = [listener, ended, *askers.values(), *(fork.sentinel for fork in askers)]
            ready = select.select(waited_for, [], [])[0]
            for fork, asker in list(askers.items()):
                if fork.sentinel in ready:
                    fork.join()
                    with contextlib.suppress(OSError), askers.pop(fork):
                        asker.send(bytes([_as_shells_say(fork.exitcode)]))
                elif asker in ready:
                    number = asker.recv(1)
                    with contextlib.suppress(ProcessLookupError):  # who asked is gone: so is the fork
                        os.kill(fork.ident or 0, number[0] if number else signal.SIGKILL)
            if ended in ready:
                _end(askers)
                return _as_shells_say(child.wait())
            if listener in ready and (started := _fork(listener.accept()[0])):
                askers |= [started]


def _end(forks: Iterable[ForkProcess]) -> None:
    """End the forks of a command that was killed: in good order, and after a grace in any. This process waits for them."""
    for fork in forks:
        fork.terminate()
    until = time.monotonic() + GRACE
    for fork in forks:
        fork.join(max(until - time.monotonic(), 0))
        fork.kill()


def _as_shells_say(code: int | None) -> int:
    return 1 if code is None else code if code >= 0 else 128 - code


def _fork(asker: socket.socket) -> tuple[ForkProcess, socket.socket] | None:
    """A fork that does what is asked for, or None for one who went away before asking."""
    _, user, _ = struct.unpack("3i", asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if user != os.geteuid():
        asker.close()
        return None
    size, files = socket.recv_fds(asker, 4, 3)[:2]
    try:
        request = json.loads(asker.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
        with contextlib.suppress(ImportError):  # the stage will say which
            for name in LIBRARIES:
                importlib.import_module(name)
        fork = ForkProcess(target=_become, args=[files], kwargs=request)
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until the fork has handlers of its own
        fork.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        return fork, asker
    except ValueError:
        asker.close()
        return None
    finally:
        for file in files:
            os.close(file)


def _become(files: list[int], module: str, arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Run a module in this fork as `python -m` does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        sys.path[0], sys.argv = cwd, [module, *arguments]
        for name in [name for name in sys.modules if name.partition(".")[0] == "stages"]:
            del sys.modules[name]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        sys.exit(130)


def ask(module: str, arguments: list[str]) -> int | None:
    """Have a module run as a fork of the process that listens at ADDRESS; its exit code, or None where nobody does.

    Ctrl-C on a terminal reaches the fork too, so this process waits for it to end; a SIGTERM is passed on.
    """
    environment = dict(os.environ)
    asker = socket.socket(socket.AF_UNIX)
    try:
        asker.connect(f"\0{environment.pop(ADDRESS)}")
    except OSError:
        return None
    if asker.fileno() < 3:  # where a standard stream should be, which is closed
        return None
    end_with_parents()
    asked = {"module": module, "arguments": arguments, "cwd": str(Path.cwd()), "environment": environment}
    request = json.dumps(asked).encode()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until all is asked
    try:
        socket.send_fds(asker, [len(request).to_bytes(4, "big")], [0, 1, 2])
        asker.sendall(request)
        signal.signal(signal.SIGTERM, lambda number, _: asker.send(bytes([number])) and None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        code = asker.recv(1)
    except OSError:
        code = b""
    if not code:
        print(f"naqsh: the process that forks stages ended before {module} did", file=sys.stderr)
    return code[0] if code else 1


def end_with_parent() -> None:
    """Get a SIGTERM when the parent is killed, on Linux, so that no orphan goes on writing."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def end_with_parents() -> None:
    """End when DVC does, or any shell between it and this process: a shell outlives a DVC that is killed."""
    end_with_parent()
    above: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            above.append(process)
            if "DVC_STAGE" not in os.environ or process.environ().get("DVC_STAGE") != os.environ["DVC_STAGE"]:
                break  # the parent, or DVC itself
        if above[-1].pid == 1 and "dvc" not in " ".join(above[-1].cmdline()):  # it is gone already
            sys.exit(143)
    threading.Thread(target=_follow, args=[above], daemon=True).start()


def _follow(processes: list[psutil.Process]) -> None:
    while all(map(is_alive, processes)):
        time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that ended and whose end nobody has heard of yet does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
