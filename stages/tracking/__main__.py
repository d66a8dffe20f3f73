"""The commands of the mirror in MLflow.

python -m stages.tracking          publish every finished cell of the sweep (`make sync`)
python -m stages.tracking ui       the same, then open the MLflow UI (`make ui`)
python -m stages.tracking restore  restore the experiment that somebody deleted, then the same
"""

import argparse
import os
import socket
import sys
from typing import TYPE_CHECKING

from stages.errors import UserError, in_one_line, masked
from stages.pipeline import params, sources
from stages.tracking import mirror, mlflow_forms, store

if TYPE_CHECKING:
    from mlflow import MlflowClient


def _serve(port: int) -> None:
    """Open the UI, on this machine only, with one worker; of a store that is a server already, say where it is."""
    uri = store.uri()
    pages: list[str] = []

    def work(client: "MlflowClient", experiment: str) -> str:
        pages.append(f"/#/experiments/{experiment}/runs?compareRunsMode=CHART&{mlflow_forms.LINK}")
        return masked(uri)

    if not mirror.with_store(work, asked=True):
        sys.exit(1)
    if uri.startswith("http"):
        print(f"MLflow: the store is a server; open {masked(uri)}{pages[0]}")
        return
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # not among the arguments, which everybody can read: it may hold a password
    print(f"MLflow: Ctrl-C stops the server. The cells side by side:\nhttp://127.0.0.1:{port}{pages[0]}", flush=True)
    server = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, server)


def _free_port(text: str) -> int:
    """The number of a port that a server may take. Raises UserError where there is no such port, or another server has it."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise UserError(f"port {text} is no number from 1 to 65535; `make ui PORT=5001`")
    port = int(text)
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except PermissionError:
        raise UserError(f"port {port} is not for everybody; `make ui PORT=5001`") from None
    except OSError:
        raise UserError(f"port {port} is in use; `make ui PORT={port % 65535 + 1}`") from None
    return port


def main() -> int:
    """Do what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m stages.tracking", description="Mirror finished cells in MLflow.")
    parser.add_argument("command", nargs="?", choices=["sync", "ui", "restore"], default="sync")
    parser.add_argument("--port", default="5000", help="of the UI (default: 5000)")
    args = parser.parse_args()
    with in_one_line("MLflow"):
        port = _free_port(args.port) if args.command == "ui" and not store.uri().startswith("http") else 0
        for line in sources.changed(params.load()):
            print(line, file=sys.stderr)
    complete = (args.command != "restore" or mirror.restore()) and mirror.sync(asked=True)
    if args.command == "ui" and complete:
        _serve(port)
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
