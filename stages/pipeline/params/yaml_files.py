"""params.yaml and its profiles as YAML: read within limits, merged with comments kept, checked whole before any data is read."""

import copy
import functools
import io
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import YAMLError

from stages.errors import UserError
from stages.pipeline.params.schema import Params, section_at
from stages.pipeline.params.wording import cut, explain, short

PARAMS = Path("params.yaml")

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
