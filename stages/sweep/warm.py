"""Stages that start at once: a process with the heavy libraries imported, of which every stage of one command is a fork.

    python -m stages.sweep.warm dvc repro

While the command runs, `python -m stages.NAME` below it need not import torch and MLflow again: `ask` sends arguments, environment
and open files here, passes signals on and brings the exit code back. A fork imports the project's own code anew. Without this
process, without Linux, or with NAQSH_WARM=0, stages start as any program does, to the same results.
"""

import contextlib
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
import time
from collections.abc import Iterable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from stages.pipeline.processes import GRACE, end_with_parent, end_with_parents

ADDRESS = "NAQSH_WARM"  # the environment variable with the name of the socket; 0 from a person: let stages start as programs do
LIBRARIES = (  # that stages import, and what takes long of what these import later
    "torch", "torch._dynamo", "safetensors.torch", "scipy.special", "scipy.linalg", "pydantic", "PIL.Image", "ruamel.yaml",
    "mlflow.entities", "mlflow.store.tracking.sqlalchemy_store",
)  # fmt: skip
BEGUN = b"\0"  # what who asked hears first: the libraries are there, its fork works
PASSED_ON = (signal.SIGINT, signal.SIGTERM)
HELD = (*PASSED_ON, signal.SIGCHLD)  # while a fork begins, until it has handlers of its own and is known here


def main(command: list[str]) -> int:
    """Run a command, and meanwhile fork a stage for each that asks; its exit code.

    The socket has a name but no file, so that a kill leaves nothing behind; who asks must be the same user.
    """
    if os.environ.get(ADDRESS) == "0":
        os.execvp(command[0], command)
    name = f"naqsh-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            os.close(os.pidfd_open(os.getpid()))
            listener.bind(f"\0{name}")
        except (AttributeError, OSError):  # no Linux, or an old one
            os.execvp(command[0], command)
        listener.listen()
        importlib.import_module("multiprocessing.connection")  # which `hear` needs, while any other import is under way
        child = subprocess.Popen(command, env={**os.environ, ADDRESS: name}, preexec_fn=end_with_parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command; this process ends with it
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        ended, askers = os.pidfd_open(child.pid), dict[ForkProcess, socket.socket]()

        def hear(*_: object) -> None:  # at any moment: to import the libraries takes long
            if child.poll() is not None:
                _end(askers)
                os._exit(_as_shells_say(child.returncode))

        signal.signal(signal.SIGCHLD, hear)
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
                with contextlib.suppress(OSError):  # who asked is gone: the next turn ends the fork
                    started[1].send(BEGUN)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def _end(forks: Iterable[ForkProcess]) -> None:
    """End the forks of a command that was killed: in good order, and after a grace in any. This process waits for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # their ends shall not be heard in the middle of this
    for fork in forks:
        fork.terminate()
    until = time.monotonic() + GRACE
    for fork in forks:
        fork.join(max(until - time.monotonic(), 0))
        fork.kill()


def _as_shells_say(code: int | None) -> int:
    return 1 if code is None else code if code >= 0 else 128 - code


def _fork(asker: socket.socket) -> tuple[ForkProcess, socket.socket] | None:
    """A fork that does what is asked for, with HELD signals blocked here and there, or None for one who went away before asking."""
    _, user, _ = struct.unpack("3i", asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if user != os.geteuid():
        asker.close()
        return None
    from stages.tracking import mlflow_forms  # here, for who asks need not wait for it

    size, files = socket.recv_fds(asker, 4, 3)[:2]
    try:
        request = json.loads(asker.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        os.environ.update({name: value for name, value in mlflow_forms.QUIET.items() if name not in os.environ})
        with contextlib.suppress(ImportError):  # the stage will say which
            for name in LIBRARIES:
                importlib.import_module(name)
        fork = ForkProcess(target=_become, args=[files], kwargs=request)
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        fork.start()
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
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_with_parent()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
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

    Ctrl-C on a terminal reaches the fork too, so this process waits for it to end. A SIGTERM is passed on; before there is a fork,
    for to import the libraries may take long, it ends this process at once, and the fork ends as it begins.
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
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        begun = asker.recv(1)
        signal.signal(signal.SIGTERM, lambda number, _: asker.send(bytes([number])) and None)
        code = asker.recv(1) if begun else b""
    except OSError:
        code = b""
    if not code:
        print(f"naqsh: the process that forks stages ended before {module} did", file=sys.stderr)
    return code[0] if code else 1


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # at once: to take all libraries apart would take seconds
