"""YAML text into frozen dataclasses by their annotations, strictly, reporting every mistake.

Values are read by the type of the field, not by YAML 1.1's rules: 1e-3 is a number and 200_000 an
integer; 010, 1:30 and `yes` are neither. Members of a union are told apart by `kind`. Each mistake
is `file:line:col: path: message, did you mean 'x'?`.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from infra.errors import UserError

T = TypeVar("T")

INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
FLOAT = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True, order=True)
class Mark:
    """`file:line:col`, or the override (line 0). Sorts in reading order, overrides last."""

    layer: int
    source: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Node:
    """A YAML value before it has a type. None: unreadable, and already reported."""

    value: "str | list[Node] | dict[str, Node] | None"
    mark: Mark
    key_mark: Mark
    plain: bool = True  # an unquoted scalar: may be a number, true, false or null
    chosen_at: Mark | None = None  # where the preset that says this was named, if it is from one


Problems = list[tuple[Mark, str]]


class _Loader(yaml.SafeLoader):
    """Refuses aliases (a small file can expand without bound) and tags (types come from us)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        at: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases are not supported", at)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(None, None, "tags are not supported", at)
        return super().compose_node(parent, index)


def parse(text: str, start: Mark, problems: Problems, chosen_at: Mark | None = None) -> Node:
    """A YAML text as nodes; on a syntax error a Node without value. Overrides keep their mark."""

    def at(mark: Any) -> Mark:
        if not start.line or mark is None:
            return start
        return dataclasses.replace(start, line=mark.line + 1, column=mark.column + 1)

    def convert(node: yaml.Node, key_mark: Mark, path: str) -> Node:
        mark = at(node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            items = [
                convert(item, at(item.start_mark), f"{path}[{i}]")
                for i, item in enumerate(node.value)
            ]
            return Node(items, mark, key_mark, chosen_at=chosen_at)
        if isinstance(node, yaml.ScalarNode):
            return Node(node.value, mark, key_mark, node.style is None, chosen_at)
        entries: dict[str, Node] = {}
        for key, value in node.value:
            here = at(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                problems.append((here, "a key must be a word, not a list or mapping"))
            elif key.value in entries:
                first = entries[key.value].key_mark
                message = f"duplicate key, first at {first}"
                problems.append((here, f"{_join(path, key.value)}: {message}"))
            else:
                entries[key.value] = convert(value, here, _join(path, key.value))
        return Node(entries, mark, key_mark, chosen_at=chosen_at)

    try:
        node = yaml.compose(text, Loader=_Loader)
        return Node("", start, start) if node is None else convert(node, start, "")
    except yaml.MarkedYAMLError as error:
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        problems.append((at(error.problem_mark), f"not valid YAML: {error.problem}{hint}"))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if start.line else 0
        mark = dataclasses.replace(start, line=line)
        problems.append((mark, "not valid YAML: control characters are not allowed"))
    except RecursionError:
        problems.append((start, "not valid YAML: nested too deeply"))
    return Node(None, start, start)


def merge(lower: Node, upper: Node) -> Node:
    """`upper` over `lower`, key by key; another `kind` replaces the whole mapping."""
    if not (isinstance(lower.value, dict) and isinstance(upper.value, dict)):
        return upper
    old, new = lower.value.get("kind"), upper.value.get("kind")
    if old is not None and new is not None and old.value != new.value:
        return upper
    merged = dict(lower.value)
    for key, node in upper.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    nearest = min(lower, upper, key=lambda node: node.mark.layer)  # the recipe file if it can be
    return dataclasses.replace(nearest, value=merged)


def entry(node: Node | None, key: str) -> Node | None:
    return node.value.get(key) if node is not None and isinstance(node.value, dict) else None


# --- from nodes to values ------------------------------------------------------------------------


class _Invalid(Exception):
    """This value cannot be built; why is already among the problems."""


def build(cls: type[T], root: Node, problems: Problems) -> T:
    try:
        value = _read_dataclass((cls,), root, "", MISSING, problems)
    except _Invalid:
        value = None
    if problems:
        raise user_error(problems)
    assert isinstance(value, cls)
    return value


def user_error(problems: Problems) -> UserError:
    return UserError("\n".join(f"{mark}: {message}" for mark, message in sorted(problems)))


def _read(hint: Any, node: Node, path: str, default: object, problems: Problems) -> Any:
    """The node as a value of the annotated type. Raises _Invalid after reporting."""
    if node.value is None:
        raise _Invalid
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if NoneType in members and is_null(node):
        return None
    members = tuple(member for member in members if member is not NoneType)
    if all(dataclasses.is_dataclass(member) for member in members):
        return _read_dataclass(members, node, path, default, problems)
    (hint,) = members
    if get_origin(hint) is tuple:
        return _read_tuple(get_args(hint), node, path, problems)
    return _read_scalar(hint, node, path, problems)


def _read_dataclass(
    members: tuple[Any, ...], node: Node, path: str, default: object, problems: Problems
) -> Any:
    if not isinstance(node.value, dict):
        _fail(problems, node.mark, path, f"expected a mapping, got {describe(node)}")
    cls = _class_by_kind(members, node, path, default, problems)
    hints, fields = _hints(cls), {key_of(field): field for field in dataclasses.fields(cls)}
    unreadable: set[str] = set()
    valid = True
    for key, item in node.value.items():
        if key not in fields:
            near = did_you_mean(key, fields) or f" (known: {', '.join(fields)})"
            problems.append((item.key_mark, f"{_join(path, key)}: unknown key{near}"))
            unreadable.update(nearest(key, fields))
            valid = False
    values: dict[str, Any] = {}  # by key, as all that is said of them
    for name, field in fields.items():
        values[name] = getattr(default, field.name) if type(default) is cls else field.default
        if name in node.value:
            try:
                where, hint = _join(path, name), hints[field.name]
                values[name] = _read(hint, node.value[name], where, values[name], problems)
            except _Invalid:
                unreadable.add(name)
        elif values[name] is MISSING and name not in unreadable:  # one mistake, one line
            problems.append((node.key_mark, f"{_join(path, name)}: missing, there is no default"))
            unreadable.add(name)
    if any(values[name] is MISSING for name in fields):
        raise _Invalid
    value = _construct(cls, values, node, path, unreadable, problems)
    if unreadable or not valid:
        raise _Invalid
    return value


def key_of(field: "dataclasses.Field[Any]") -> str:
    """What a field is called in YAML: by its name, unless that is a word of Python (`from`)."""
    return str(field.metadata.get("key", field.name))


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _class_by_kind(
    members: tuple[Any, ...], node: Node, path: str, default: object, problems: Problems
) -> Any:
    if len(members) == 1:
        return members[0]
    kinds = {member.kind: member for member in members}
    written = entry(node, "kind")
    if written is None:
        if type(default) in members:
            return type(default)
        _fail(problems, node.key_mark, f"{path}.kind", f"missing, one of {', '.join(kinds)}")
    if not isinstance(written.value, str) or written.value not in kinds:
        message = f"expected one of {', '.join(kinds)}, got {describe(written)}"
        _fail(problems, written.mark, f"{path}.kind", message + did_you_mean(written.value, kinds))
    return kinds[written.value]


def _construct(
    cls: Any,
    values: dict[str, Any],
    node: Node,
    path: str,
    unreadable: set[str],
    problems: Problems,
) -> Any:
    """cls of values by key. Its ValueErrors begin with the key; each key's first one is reported.

    A class stops at its first objection, so the field goes back to its default to hear the next.
    The unreadable fields stand at their defaults too: what is said of those, nobody wrote.
    """
    names = {key_of(field): field.name for field in dataclasses.fields(cls)}
    defaults = {key_of(field): field.default for field in dataclasses.fields(cls)}
    objections = 0
    settled = set(unreadable)
    while True:
        try:
            value = cls(**{names[key]: value for key, value in values.items()})
        except ValueError as error:
            objection = str(error)
        else:
            if objections:
                raise _Invalid
            return value
        dotted, _, message = objection.partition(": ")
        field = dotted.partition(".")[0]
        assert field in defaults, f"{cls.__name__}: {objection!r} does not begin with a field"
        mentioned = {word.partition(".")[0] for word in _words(objection)}
        if field in settled or mentioned & unreadable:
            raise _Invalid
        mark = _mark_of(node, dotted, message)
        problems.append((mark, f"{_join(path, dotted)}: {message}"))
        if defaults[field] is MISSING:
            raise _Invalid
        values[field] = defaults[field]
        settled.add(field)
        objections += 1


def _mark_of(node: Node, dotted: str, message: str) -> Mark:
    """Where the field was written; else another field that the message names; else the mapping."""
    for candidate in [dotted, *_words(message)]:
        found: Node | None = node
        for part in candidate.split("."):
            found = entry(found, part)
        if found is not None:  # what a preset says, a person chose by writing its name
            return found.chosen_at or found.mark
    return node.key_mark


def _read_tuple(
    items: tuple[Any, ...], node: Node, path: str, problems: Problems
) -> tuple[Any, ...]:
    if not isinstance(node.value, list):
        _fail(problems, node.mark, path, f"expected a list [..., ...], got {describe(node)}")
    if items[-1] is Ellipsis:
        items = items[:1] * len(node.value)
    if len(items) != len(node.value):
        message = f"expected {len(items)} values, got {len(node.value)}"
        _fail(problems, node.mark, path, message)
    values = []
    for i, (hint, item) in enumerate(zip(items, node.value, strict=True)):
        try:
            values.append(_read(hint, item, f"{path}[{i}]", MISSING, problems))
        except _Invalid:
            continue
    if len(values) < len(items):
        raise _Invalid
    return tuple(values)


def _read_scalar(hint: Any, node: Node, path: str, problems: Problems) -> Any:
    """str, int, float, bool or Literal, by the field's type and the text as written."""
    text = node.value if isinstance(node.value, str) else None
    number = text if text is not None and node.plain else ""
    expected = {str: "text", int: "an integer", float: "a finite number", bool: "true or false"}
    hint_for_user = ""
    if get_origin(hint) is Literal:
        allowed = {str(value): value for value in get_args(hint)}
        if text in allowed and (node.plain or isinstance(allowed[text], str)):
            return allowed[text]
        wanted = f"one of {', '.join(allowed)}"
        hint_for_user = did_you_mean(text, allowed)
    else:
        wanted = expected[hint]
    if hint is str and text is not None and not (node.plain and _reads_as_other(text)):
        return text
    if hint is str and number:
        hint_for_user = " (quote it if it is meant as text)"
    if hint is bool and number in ("true", "True", "false", "False"):
        return number in ("true", "True")
    if hint is int:
        if INT.fullmatch(number) and len(number) <= 30:
            return int(number)
        if FLOAT.fullmatch(number) and abs(float(number)) < 1e15 and float(number).is_integer():
            hint_for_user = f" (write {int(float(number)):_})"
    if hint is float and FLOAT.fullmatch(number) and math.isfinite(float(number)):
        return float(number)
    _fail(problems, node.mark, path, f"expected {wanted}, got {describe(node)}{hint_for_user}")


def _fail(problems: Problems, mark: Mark, path: str, message: str) -> NoReturn:
    problems.append((mark, f"{path}: {message}" if path else message))
    raise _Invalid


def _reads_as_other(text: str) -> bool:
    """Whether YAML takes the unquoted text for a number, a truth value or null."""
    tag = yaml.resolver.Resolver().resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return str(tag).rpartition(":")[2] in ("int", "float", "bool", "null")


def is_null(node: Node) -> bool:
    return node.plain and node.value in ("", "~", "null", "Null", "NULL")


def describe(node: Node) -> str:
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    return "nothing" if is_null(node) else str(node.value) if node.plain else repr(node.value)


def _words(message: str) -> list[str]:
    """The words of an objection, dotted ones whole: among them the fields that it names."""
    return re.findall(r"[A-Za-z_][\w.]*\w|[A-Za-z]", message)


def nearest(word: object, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    return "".join(f", did you mean {name!r}?" for name in nearest(word, known))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
