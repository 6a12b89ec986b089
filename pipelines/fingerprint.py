"""Identity of a frozen config: one canonical JSON form, its sha256, and what differs between two.

Anything without a canonical form is refused rather than guessed at: a wrong cache hit costs more
than an error. Class names are part of the form, module paths are not (files may move).
"""

import dataclasses
import hashlib
import json
import math
from typing import TypeAlias

Canonical: TypeAlias = "bool | int | str | list[Canonical] | dict[str, Canonical] | None"

CLASS = "@"  # cannot be a field name, so a dataclass is never mistaken for a float


def canonical(value: object) -> Canonical:
    """JSON-able form of dataclasses, tuples, str, int, float, bool and None.

    Floats become `{"float": repr}` so that 1, 1.0 and True stay three things. Raises TypeError on
    every other type (subclasses included: a numpy float is not a float here), ValueError on
    NaN and infinity, both naming the field.
    """
    return _canonical(value, "")


def _canonical(value: object, path: str) -> Canonical:
    if value is None or type(value) in (bool, int, str):
        assert value is None or isinstance(value, bool | int | str)
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{path or 'value'}: {value} has no canonical form")
        return {"float": repr(value + 0.0)}  # + 0.0 turns -0.0, which equals 0.0, into 0.0
    if type(value) is tuple:
        return [_canonical(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        form: dict[str, Canonical] = {CLASS: type(value).__qualname__}
        for field in dataclasses.fields(value):
            if not field.metadata.get("identity", True):
                continue  # says where something lies, not what it is
            form[field.name] = _canonical(getattr(value, field.name), _join(path, field.name))
        return form
    raise TypeError(f"{path or 'value'}: a {type(value).__name__} has no canonical form")


def canonical_json(form: Canonical) -> str:
    return json.dumps(form, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint_of(value: object) -> str:
    """sha256 (64 hex digits) of the canonical JSON; TypeError or ValueError as `canonical`."""
    return hashlib.sha256(canonical_json(canonical(value)).encode("ascii")).hexdigest()


def diff(old: Canonical, new: Canonical) -> list[str]:
    """Lines like `teacher.lr: 0.001 -> 0.002`, in the new form's order; empty when equal."""
    return _diff(old, new, "")


def _diff(old: Canonical, new: Canonical, path: str) -> list[str]:
    if canonical_json(old) == canonical_json(new):  # not ==, to which 1 and True are the same
        return []
    if isinstance(old, dict) and isinstance(new, dict) and CLASS in old and CLASS in new:
        if old[CLASS] == new[CLASS]:
            lines = []
            for name in [*new, *(name for name in old if name not in new)]:
                where = _join(path, name)
                if name not in old:
                    lines.append(f"{where}: (absent) -> {_show(new[name])}")
                elif name not in new:
                    lines.append(f"{where}: {_show(old[name])} -> (absent)")
                else:
                    lines += _diff(old[name], new[name], where)
            return lines
        if old.get("kind") != new.get("kind"):  # the word a person wrote says it best
            return _diff(old.get("kind"), new.get("kind"), _join(path, "kind"))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = zip(old, new, strict=True)
        if all(isinstance(item, dict) and CLASS in item for item in [*old, *new]):
            return [line for i, (a, b) in enumerate(parts) for line in _diff(a, b, f"{path}[{i}]")]
    shown_old, shown_new = _show(old), _show(new)
    if shown_old == shown_new:  # text "1" against the number 1
        shown_old, shown_new = canonical_json(old), canonical_json(new)
    return [f"{path or 'value'}: {shown_old} -> {shown_new}"]


def _show(form: Canonical) -> str:
    if isinstance(form, dict):
        if CLASS not in form:
            return str(form["float"])
        fields = (f"{name}={_show(item)}" for name, item in form.items() if name != CLASS)
        return f"{form[CLASS]}({', '.join(fields)})"
    if isinstance(form, list):
        return f"[{', '.join(_show(item) for item in form)}]"
    return form if isinstance(form, str) else json.dumps(form)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
