"""What git says of this folder: the commit, what differs from it, which commit first had a result."""

import os
import subprocess

from stages.errors import masked

# What can change a result, beside the data: a run is `dirty` when one of these differs from the commit.
DECISIVE = ("stages", "params.yaml", "dvc.yaml", "pyproject.toml", "constraints.txt")


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
