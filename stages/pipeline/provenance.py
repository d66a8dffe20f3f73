"""What decides a cell's results, and where they come from: the run key, what dvc.lock records, the state of git."""

import hashlib
import itertools
import json
import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages import UserError, masked
from stages.diffusion import by_name
from stages.pipeline import params, paths
from stages.pipeline.params import Cell
from stages.pipeline.stage import damaged, sound

# What can change a result, beside the data: a run is `dirty` when one of these differs from the commit.
DECISIVE = ("stages", "params.yaml", "dvc.yaml", "pyproject.toml", "constraints.txt")


LOCK = Path("dvc.lock")


def workspace() -> Path:
    """The root of the working tree; for a temporary one of DVC's (`--temp`, the queue), the root it was made from."""
    here = Path.cwd().resolve()
    for parent in here.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return here


@dataclass(frozen=True)
class Tree:
    """The working tree, read once: the stages that lead to a cell's scores, what dvc.lock says of them, the parameters.

    `lock` holds the text of each stage's entry: most are never asked for, and to parse them all takes longer than all else here.
    """

    stages: dict[str, Any]
    lock: dict[str, str]
    params: params.Params

    @classmethod
    def read(cls) -> "Tree":
        """The tree in the current folder."""
        stages = params.read_yaml(Path("dvc.yaml"))["stages"]
        return cls({name: stage for name, stage in stages.items() if "matrix" in stage}, lock_entries(_lock()), params.load())

    def recorded(self, stage: str) -> dict[str, Any]:
        """What dvc.lock says of a stage; nothing where it does not know it. Raises UserError where it is damaged."""
        entry = params.parse_yaml(self.lock.get(stage, ""), LOCK)
        with sound(LOCK):
            found = dict(entry[stage]) if entry else {}
            for item in (*found.get("deps", []), *found.get("outs", [])):
                item["path"], item["md5"]
            return found

    def key(self, cell: Cell) -> str:
        """The run key: a hash of all that decides a cell's results; known before training starts, the same in every clone.

        It covers the cell, the parameters and the code of every stage that leads to its scores, and the digest of the raw data;
        never an output, nor line endings, nor a schedule or sampler that it does not use. Raises UserError when DVC did not fetch
        the raw data.
        """
        values = self.params.model_dump()
        deps = {dep for stage in self.stages.values() for dep in paths.deps(stage, str(cell), values)}
        others = {f"stages/diffusion/schedules/{name}.py" for name in by_name.names("schedules") if name != cell.schedule}
        code = {dep for dep in deps - others if dep.endswith(".py")}  # prepare reads others, for a picture alone
        text = {path: Path(path).read_bytes().replace(b"\r\n", b"\n").decode() for path in code}
        flat = self._chain(cell)
        decisive = {name: value for name, value in flat.items() if not _decides_no_pixel(name)}
        return content_hash([decisive, text, self.raw_digest(cell.dataset)])[:32]

    def raw_digest(self, dataset: str) -> str:
        """MD5 that DVC gave the raw data of a dataset."""
        for out in self.recorded(f"fetch@{dataset}").get("outs", []):
            if out["path"] == str(paths.raw(dataset)):
                return str(out["md5"])
        raise UserError(f"dvc.lock does not record {paths.raw(dataset)}; `dvc repro fetch@{dataset}` does")

    def chain_params(self, cell: Cell) -> dict[str, Any]:
        """The parameters that lead to a cell's scores, by dotted name, as its dataset sees them, and what makes the cell.

        For the record: secrets in them are masked.
        """
        return {name: masked(value) if isinstance(value, str) else value for name, value in self._chain(cell).items()}

    def _chain(self, cell: Cell) -> dict[str, Any]:
        flat: dict[str, Any] = {"dataset": cell.dataset, "schedule": cell.schedule, "T": cell.T, "seed": cell.seed}
        seen = self.params.model_copy(update={"train": self.params.train.of(cell.dataset)})
        for stage in self.stages.values():
            for name, value in _params_of(stage, cell, seen).items():
                flat |= _flatten(name, value)
        return flat

    def without_last_phase(self) -> "Tree | None":
        """The tree as it would be with one phase of training less; None where there is but one."""
        train = self.params.train
        if len(train.images) == 1:
            return None
        shorter = train.model_copy(update={"images": train.images[:-1]})
        return replace(self, params=self.params.model_copy(update={"train": shorter}))

    def is_recorded(self, cell: Cell, *, before: str | None = None) -> bool:
        """Whether, by dvc.lock, the cell's files come from the code, the parameters and the data that are here now.

        `before`: a stage; it and those after it do not count.
        """
        made: dict[str, str] = {}
        values = self.params.model_dump()
        for name, stage in itertools.takewhile(lambda item: item[0] != before, self.stages.items()):
            entry = self.recorded(f"{name}@{cell if 'schedule' in stage['matrix'] else cell.dataset}")
            locked = {dep["path"]: dep["md5"] for dep in entry.get("deps", [])}
            if (entry.get("params") or {}).get("params.yaml") != _params_of(stage, cell, self.params):
                return False
            if locked.keys() != set(paths.deps(stage, str(cell), values)):
                return False
            if any(digest != (made.get(path) or md5(Path(path))) for path, digest in locked.items()):
                return False
            made |= {out["path"]: out["md5"] for out in entry.get("outs", [])}
        scores = paths.scores("evaluate", str(cell))
        return before is not None or made.get(str(scores)) == md5(scores)


def _lock() -> str:
    """The text of dvc.lock; empty where there is none. Raises UserError when it is no text, or two texts at once."""
    try:
        content = LOCK.read_bytes() if LOCK.exists() else b""
        refuse_conflict(content)
        return content.decode().replace("\r\n", "\n")
    except (OSError, UnicodeError) as error:
        raise damaged(LOCK, error) from None


def lock_entries(text: str) -> dict[str, str]:
    """The entries of a dvc.lock, by the name of their stage, as text."""
    return {entry.partition(":\n")[0].strip(): entry for entry in re.split(r"^(?=  [^\s#])", text, flags=re.MULTILINE)[1:]}


def refuse_conflict(content: bytes) -> None:
    """Raises UserError where a dvc.lock holds two texts at once."""
    if re.search(rb"^(<<<<<<<|>>>>>>>) ", content, re.MULTILINE):
        raise UserError(f"{LOCK} has conflict markers of git; `git checkout --ours {LOCK}`, then `dvc repro`")


def outputs(loaded: params.Params) -> list[str]:
    """The paths of all that the stages of the sweep write, as dvc.yaml names them."""
    named = [out for stage in params.read_yaml(Path("dvc.yaml"))["stages"].values() for out in paths.outs(stage)]
    return list(dict.fromkeys(paths.of_item(out, str(cell)) for cell in loaded.sweep.cells() for out in named))


def _params_of(stage: dict[str, Any], cell: Cell, loaded: params.Params) -> dict[str, Any]:
    values = loaded.model_dump()
    return {name: _at(values, name) for name in (paths.of_item(item, str(cell)) for item in stage["params"])}


def origins() -> dict[str, dict[str, str]]:
    """By the MD5 of an output: the first commit or experiment whose dvc.lock holds it, and the command that restores it.

    Nothing where git cannot answer.
    """
    refs = (git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps") or "").splitlines()
    experiments = {ref.split()[0]: ref.split("/")[-1] for ref in refs if "refs/exps/exec/" not in ref}
    found: dict[str, dict[str, str]] = {}
    commit = ""
    history = ("--all", "--reverse", "--no-show-signature", "--no-notes", "--no-follow", "--format=commit %H", "--patch")
    for line in (git("log", *history, *_PLAIN, "-U0", "--", "dvc.lock") or "").split("\n"):
        word, _, rest = line.partition(" ")
        if word == "commit":
            commit = rest
        elif word == "+" and rest.strip().startswith("md5: "):
            name = experiments.get(commit)
            restore = f"dvc exp apply {name}" if name else f"git checkout {commit} && dvc checkout"
            found.setdefault(rest.split()[-1], {"results_commit": commit, "results_restore": restore})
    return found


def commit() -> str | None:
    """The hash of the commit that is checked out; None where git cannot tell.

    That is where there is no git, no repository or no commit, or where it belongs to another user or to another project.
    """
    return (git("rev-parse", "--verify", "--quiet", "HEAD^{commit}") or "").strip() or None if _is_tracked() else None


def uncommitted() -> str | None:
    """The diff of the decisive files against HEAD, secrets masked, and the names of those that git does not track.

    Empty when there is none; None where git cannot tell.
    """
    changed = git("diff", *_PLAIN, "-U3", "HEAD", "--", *DECISIVE)
    others = git("ls-files", "-z", "--others", "--", *DECISIVE)
    if changed is None or others is None or not _is_tracked():
        return None
    new = [name for name in others.split("\0") if name in DECISIVE or name.endswith((".py", "/"))]
    return masked(changed) + "".join(f"# git does not track {name}: its content is not kept\n" for name in new)


def dirty() -> str:
    """Whether what decides a result differs from the commit: true, false, or unknown where git cannot tell."""
    found = uncommitted()
    return "unknown" if found is None else str(bool(found)).lower()


def _is_tracked() -> bool:
    """Whether the repository holds any of the decisive files: else this folder merely lies in another project's."""
    return bool(git("ls-files", "--", *DECISIVE))


# Settings that a person's git may have, and that change what a diff looks like.
_PLAIN = (
    *("--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--no-relative", "--src-prefix=a/", "--dst-prefix=b/"),
    *("--diff-algorithm=myers", "--inter-hunk-context=0", "--ignore-submodules=none", "--submodule=short", f"-O{os.devnull}"),
)
_SETTINGS = {"core.quotePath": "off", "core.fsmonitor": "false", "diff.suppressBlankEmpty": "false", "log.showRoot": "true"}
_ENVIRONMENT = {"GIT_OPTIONAL_LOCKS": "0", "GIT_PAGER": "cat", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def git(*arguments: str) -> str | None:
    """What git prints in the current folder, whatever the person's settings; None where it fails or is missing."""
    settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIFF_OPTS", "GIT_EXTERNAL_DIFF")}
    command = ["git", "--no-pager", *settings, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, env=environment | _ENVIRONMENT)
    except OSError:
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def content_hash(value: Any) -> str:
    """SHA-256, in hexadecimal, of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def md5(path: Path) -> str:
    """MD5 of a file, as DVC takes it; empty when there is no such file."""
    return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""


def _decides_no_pixel(name: str) -> bool:
    """Whether a parameter says from where the raw data came, whose digest says what they are, or what they are licensed as."""
    return name.startswith("data.") and name.rpartition(".")[2] in ("path", "url", "drive", "sha256", "licence", "strict")


def _at(values: dict[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        values = values[part]
    return values


def _flatten(dotted: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {dotted: value}
    return {name: leaf for part, inner in value.items() for name, leaf in _flatten(f"{dotted}.{part}", inner).items()}
