"""params.yaml and its profiles as YAML: read within limits, merged with comments kept, checked whole before any data is read."""

import copy
import functools
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode

from stages.errors import UserError
from stages.pipeline.files import is_held, whole_file
from stages.pipeline.params.schema import Params, section_at
from stages.pipeline.params.wording import cut, explain, short

PARAMS = Path("params.yaml")
REPRO_LOCK = Path(".state/locks/repro.lock")  # `make repro` holds it

LARGEST, DEEPEST = 100_000, 50  # bytes, and levels, of a YAML file: a person wrote it
MOST_MISTAKES = 20


def load(path: Path = PARAMS) -> Params:
    """The checked parameters. Raises UserError, one line for each mistake."""
    return _check(read_yaml(path), path)


def merged(profile: Path, path: Path = PARAMS) -> str:
    """The text of params.yaml with the values of a profile, comments kept. Raises UserError when the result is not valid."""
    load(path)  # what is wrong with it already is told as ever
    changes = read_yaml(profile)
    if not isinstance(changes, dict):
        raise UserError(f"{profile} must map sections to what changes in them, like {PARAMS}")
    yaml = YAML()  # round-trip
    yaml.width, yaml.preserve_quotes = 4096, True
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    values = yaml.load(path.read_text(encoding="utf-8-sig"))
    _overwrite(values, changes, where=f"{profile}: ")
    text = io.StringIO()
    try:
        yaml.dump(values, text)
    except (YAMLError, ValueError) as error:
        raise UserError(f"{profile} holds what cannot be written: {cut(' '.join(str(error).split()), 500)}") from None
    _check(parse_yaml(text.getvalue(), profile), profile)
    return text.getvalue()


def with_dataset(name: str, section: dict[str, Any], path: Path = PARAMS) -> str:
    """The text of params.yaml with a dataset more in `data` and in `sweep.datasets`, where it is not there; all else is kept.

    Args:
        section: of plain values.

    Raises:
        UserError: the file, or what would become of it, is not valid; or it is written in another form than this can add to.
    """
    expected = read_yaml(path)
    _check(expected, path)
    text = path.read_bytes().decode("utf-8-sig")
    is_new, is_swept = name not in expected["data"], name in expected["sweep"]["datasets"]
    if not is_swept:
        expected["sweep"]["datasets"].append(name)
    if is_new:
        expected["data"][name] = section
    try:
        text = text if is_swept else _with_item(text, _node(text, "sweep", "datasets"), name)
        text = _with_section(text, _node(text, "data"), name, section) if is_new else text
        written = parse_yaml(text, path)
    except (YAMLError, UserError):
        written = None
    if written != expected:
        entry = ", ".join(f"{key}: {_scalar(value)}" for key, value in section.items())
        raise UserError(
            f"{path} is in another form than can be added to; add `{name}: {{{entry}}}` to data, and {name} to sweep.datasets"
        )
    _check(written, path)
    return text


def write(text: str, path: Path = PARAMS) -> None:
    """Write params.yaml, whole: a link to it stays one, and who may read it may still.

    Raises:
        UserError: it is read-only, or `make repro` runs, which would compare results of the old parameters by the new ones.
    """
    refuse_while_repro()
    target = path.resolve()
    if not (os.access(target, os.W_OK) and target.stat().st_mode & 0o222):
        raise UserError(f"{path} is read-only; `chmod u+w {path}`, then type this again")
    with whole_file(target) as temporary:
        temporary.write_bytes(text.encode())
        shutil.copymode(target, temporary)


def refuse_while_repro() -> None:
    """Raise UserError where a `make repro` works in this folder."""
    if is_held(REPRO_LOCK):
        raise UserError(f"`make repro` works in this folder and reads {PARAMS}; type this when it has ended")


def is_committed(path: Path = PARAMS) -> bool:
    """Whether the file is as the last commit has it, so that `git checkout` brings back what it holds now."""
    command = ["git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=all", "--ignored", "--", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    except OSError:  # there is no git
        return False
    return done.returncode == 0 and not done.stdout and not path.is_symlink()


def _with_item(text: str, names: Any, name: str) -> str:
    """The text with a name more at the end of a list in it."""
    if not names.flow_style:
        return _with_lines(text, _last(names), [f"{' ' * names.start_mark.column}- {name}"])
    after = names.value[-1].end_mark.index  # a comma, or a remark, may follow
    return f"{text[:after]}, {name}{text[after:]}"


def _with_section(text: str, data: Any, name: str, section: dict[str, Any]) -> str:
    """The text with a section more at the end of a mapping in it."""
    indent = " " * data.start_mark.column
    return _with_lines(text, _last(data), [f"{indent}{name}:", *(f"{indent * 2}{key}: {_scalar(section[key])}" for key in section)])


def _node(text: str, *keys: str) -> Any:
    """The node of a value in a YAML text, which knows its place."""
    node = YAML(typ="rt", pure=True).compose(text)
    for key in keys:
        node = next(value for name, value in node.value if name.value == key)
    return node


def _last(node: Any) -> Any:
    """The last node in it that stands for itself: a scalar, or what is in brackets."""
    while not isinstance(node, ScalarNode) and not node.flow_style and node.value:
        node = node.value[-1][1] if isinstance(node, MappingNode) else node.value[-1]
    return node


def _with_lines(text: str, node: Any, lines: list[str]) -> str:
    """The text with lines after that on which a node ends."""
    end = "\r\n" if "\r\n" in text else "\n"
    ends = text.find("\n", max(0, node.end_mark.index - 1)) + 1  # 0: it is the last line, and open
    before = text[:ends] if ends else text + end
    return before + "".join(line + end for line in lines) + (text[ends:] if ends else "")


def _scalar(value: Any) -> str:
    """A plain value as YAML: a text in quotes, unless it reads the same without."""
    if isinstance(value, str) and re.fullmatch(r"[\w./~-]+", value) and parse_yaml(value, PARAMS) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _overwrite(values: Any, changes: dict[str, Any], where: str) -> None:
    for key, change in changes.items():
        if key not in values:
            raise UserError(f"{where}{short(key, str)} is no key of {PARAMS}; known here: {', '.join(values)}")
        if key == "longer" and isinstance(change, dict):
            values[key].clear()  # names that are there are no keys to choose from
            values[key].update(change)
        elif isinstance(change, dict) and isinstance(values[key], dict):
            _overwrite(values[key], change, f"{where}{key}.")
        elif isinstance(change, list) and isinstance(values[key], list):
            values[key][:] = change  # the list stays the same object, for a comment behind it belongs to it
            values[key].fa.set_flow_style()
        else:
            values[key] = change


def section(name: str, values: dict[str, Any]) -> Any:
    """A section with these values, as if params.yaml had them. Raises UserError, one line for each mistake."""
    try:
        return section_at((name,)).model_validate(values)
    except ValidationError as error:
        mistakes = [explain({**item, "loc": (name, *item["loc"])}, section_at) for item in error.errors()]
        raise UserError("\n".join(mistakes)) from None


def _check(raw: Any, path: Path) -> Params:
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        lines = [f"{path}: {explain(item, section_at)}" for item in error.errors()[:MOST_MISTAKES]]
        more = [f"{path}: and {error.error_count() - MOST_MISTAKES} mistakes more"] * (error.error_count() > MOST_MISTAKES)
        raise UserError("\n".join(lines + more)) from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file as plain dicts and lists. Raises UserError when it is missing, too large or malformed."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, more than the {LARGEST:,} allowed; is it the right file?")
        return parse_yaml(path.read_text(encoding="utf-8-sig"), path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run this from the root of the repository") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


class _Composer(Composer):
    """Refuses deep nesting, at which it would recurse for long."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node."""
        if self.depth == DEEPEST:
            raise ComposerError(None, None, "it is nested too deeply", self.parser.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse_yaml(text: str, path: Path) -> Any:
    """The content of YAML 1.2 text out of a file. Raises UserError when it is malformed."""
    return copy.deepcopy(_parsed(text, path))


@functools.lru_cache(maxsize=8)
def _parsed(text: str, path: Path) -> Any:
    """The same, parsed once for all who read the same text: without it the last table of `make repro` takes twice as long."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    try:
        value = yaml.load(text)
    except (YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not YAML: {cut(' '.join(str(error).split()), 500)}") from None
    _check_size(value, path)
    return value


def _check_size(value: Any, path: Path) -> None:
    """Raise UserError where aliases make much, or a circle, of a short text."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        inner = [*item.keys(), *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else ()
        seen += len(inner)
        if seen > LARGEST or depth > DEEPEST:
            raise UserError(f"{path}: its aliases stand for too much, or for themselves; write the values out")
        waiting += [(part, depth + 1) for part in inner]
