"""Kill a pipeline at random moments, in every way, and see that it then goes on and ends with the bits of an unbroken run.

It runs what `make repro` runs: `plan`, which mends what a killed DVC left half-written, then `dvc repro` beside a warm process, of
which the stages are forks.

Prints one JSON line. Run: python benchmarks/kills.py [--kills 200] [--seed 0] [--folder EMPTY_FOLDER]
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
CELL = "persian_glyphs-cosine-8-0"
MADE = ("models/cells", "samples", "metrics/train", "metrics/evaluate")  # what must not depend on kills
INTERVAL = 0.3  # seconds between checkpoints

PROFILE = f"""\
sweep: {{datasets: [persian_glyphs], schedules: [cosine], timesteps: [8], seeds: [0]}}
data:
  persian_glyphs: {{size: 16, train_images: 256, test_images: 64}}
extractor: {{images: 256, batch: 32}}
network: {{channel_mult: [1, 2]}}
train: {{images: 3200, longer: {{persian_glyphs: 1}}, batch: 16, warmup_images: 32, validation_images: 32, curve_points: 8}}
sample: {{images: 256, ancestral_images: 8, snapshot_images: 64, chunk: 32, fast: {{steps: 4}}}}
evaluate: {{images: 32, draws: 2, min_scored: 32}}
runtime: {{checkpoint_seconds: {INTERVAL}}}
"""
WAYS = {  # whom, and with what
    "SIGKILL of the stage": ("stage", signal.SIGKILL),
    "SIGTERM of the stage": ("stage", signal.SIGTERM),
    "SIGKILL of who waits for it": ("asker", signal.SIGKILL),
    "SIGTERM of who waits for it": ("asker", signal.SIGTERM),
    "SIGKILL of dvc": ("dvc", signal.SIGKILL),
    "SIGTERM of dvc": ("dvc", signal.SIGTERM),
    "SIGKILL of the warm process": ("warm", signal.SIGKILL),
    "SIGTERM of the warm process": ("warm", signal.SIGTERM),
    "Ctrl-C": ("group", signal.SIGINT),
}
REPRO = (sys.executable, "-m", "stages.pipeline.warm", "dvc", "repro")


def environment() -> dict[str, str]:
    """That of a user, on one thread, so that the harness can share a small machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "GIT_CONFIG_GLOBAL": os.devnull}
    return kept | quiet | {"PATH": path, "OMP_NUM_THREADS": "1"}


def call(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{command}\n{done.stdout}\n{done.stderr}")
    return done.stdout


class Pipeline:
    """A copy of the working tree with one small cell, made once without a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = call(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        for name in filter(None, listed):
            if (ROOT / name).is_file() and not name.startswith("metrics/") and name != "dvc.lock":
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / "profiles/kills.yaml").write_text(PROFILE)
        call(folder, sys.executable, "-m", "stages.pipeline.plan", "profile", "kills")
        call(folder, "git", "init", "-q")
        call(folder, "git", "add", "-A")
        call(folder, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qm", "Start")
        call(folder, "dvc", "repro", "reference")
        shutil.copy(folder / "dvc.lock", folder / ".dvc/start.lock")  # where each round begins
        started = time.perf_counter()
        call(folder, *REPRO)
        self.seconds = time.perf_counter() - started
        self.unbroken = self.digests()

    def digests(self) -> dict[str, str]:
        """SHA-256 of every result file."""
        files = [path for name in MADE for path in sorted((self.folder / name).rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def forget(self) -> None:
        """Undo all that the cell's stages made, in DVC's memory and in MLflow too."""
        shutil.copy(self.folder / ".dvc/start.lock", self.folder / "dvc.lock")
        for name in (*MADE, "mlruns", ".dvc/cache/runs", ".state"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for path in self.folder.glob("mlflow.db*"):
            path.unlink()

    def processes(self) -> dict[str, tuple[int, str]]:
        """Who runs here: the process id and the command of `stage`, of the `asker` that waits for it, of `dvc` and of `warm`."""
        found: dict[str, tuple[int, str]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if (entry / "cwd").resolve() != self.folder:
                    continue
                if "stages.pipeline.warm" in command:
                    above = (Path("/proc") / str(parent) / "cmdline").read_bytes()
                    found["stage" if b"stages.pipeline.warm" in above else "warm"] = int(entry.name), command
                elif "-m stages." in command and "sh -c" not in command:
                    found["asker"] = int(entry.name), command
                elif "dvc repro" in command:
                    found["dvc"] = int(entry.name), command
        return found

    def killed_run(self, way: str, after: float) -> str:
        """Start `dvc repro` and kill somebody after so many seconds; the stage that it hit, "nothing" where all was done."""
        command = subprocess.Popen(
            REPRO,
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(after)
            return "nothing"
        whom, how = WAYS[way]
        running = self.processes()
        hit = "between stages"
        if "asker" in running:
            hit = next(word for word in running["asker"][1].split() if word.startswith("stages."))
        with contextlib.suppress(ProcessLookupError):
            if whom == "group":
                os.killpg(command.pid, how)
            else:
                os.kill(running.get(whom, (command.pid, ""))[0], how)
        command.wait()
        for _ in range(100):  # whom it left behind: they end in good order, and until then `plan` refuses to begin
            unreaped = [pid for pid, _ in running.values() if Path(f"/proc/{pid}").exists()]  # DVC takes them for alive
            if not self.processes() and not unreaped:
                break
            time.sleep(0.1)
        return hit

    def faults(self) -> list[str]:
        """What is not as after an unbroken run."""
        found = [f"differs: {name}" for name, digest in self.digests().items() if self.unbroken.get(name) != digest]
        found += [f"missing: {name}" for name in self.unbroken.keys() - self.digests().keys()]
        found += [f"left over: {path}" for path in self.folder.rglob("*.partial*")]
        found += [f"left over: {path}" for path in self.folder.glob(".state/checkpoints/*")]
        if running := self.processes():
            found.append(f"still running: {running}")
        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("naqsh")
        runs = client.search_runs([experiment.experiment_id]) if experiment else []
        if [run.info.status for run in runs] != ["FINISHED"]:
            found.append(f"runs: {[run.info.status for run in runs]}")
        rows = (self.folder / f"metrics/train/{CELL}.csv").read_text().splitlines()[1:]
        for run in runs:
            for name in ("train_loss", "images_per_sec"):
                steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
                if steps != [int(row.split(",")[0]) for row in rows]:
                    found.append(f"steps of {name}: {steps}")
        return found


def soak(pipeline: Pipeline, kills: int, seed: int) -> dict[str, Any]:
    """Rounds of one to three kills, each followed by a `dvc repro` that may end; stops at the first fault."""
    rng, done, hits, ways, rounds = random.Random(seed), 0, Counter[str](), Counter[str](), 0
    with tqdm(total=kills, unit="kill", disable=None) as bar:
        while done < kills:
            pipeline.forget()
            history = []
            for _ in range(min(rng.randint(1, 3), kills - done)):
                way = rng.choice(list(WAYS))
                after = rng.uniform(0.5, pipeline.seconds)
                hit = pipeline.killed_run(way, after)
                history.append((way, hit, round(after, 2)))
                if hit == "nothing":
                    break
                hits[hit] += 1
                ways[way] += 1
                done += 1
                bar.update()
            rounds += 1
            call(pipeline.folder, sys.executable, "-m", "stages.pipeline.plan", "plan")
            call(pipeline.folder, *REPRO)
            if faults := pipeline.faults():
                return {"kills": done, "rounds": rounds, "history": history, "faults": faults}
    return {"kills": done, "rounds": rounds, "hits": dict(hits), "ways": dict(ways), "faults": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        pipeline = Pipeline((args.folder or Path(temporary) / "naqsh").resolve())
        started = time.perf_counter()
        result = soak(pipeline, args.kills, args.seed)
        print(
            json.dumps({**result, "seconds": round(time.perf_counter() - started), "unbroken_seconds": round(pipeline.seconds, 1)})
        )
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
