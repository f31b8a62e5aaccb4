"""Typed, documented, bounded options: frozen dataclasses to and from JSON, dotted overrides and help text."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from poa.errors import InputError

T = TypeVar("T")

SHOWN = 60  # characters of a wrong value in a message
FEW = 30  # options that a message may list
SHORT_FLOAT = re.compile(r"[+-]?(\.\d+|\d+\.)(e[+-]?\d+)?", re.IGNORECASE)  # as `.1`, which JSON has not


def option(default: Any, help: str, within: str = "") -> Any:
    """A dataclass field with the text that `--help` shows.

    A number, or each of several, must lie in the interval `within`, such as `[1, 4096]` or `(0, 1]`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "within": within})


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`, either end included or not. NaN lies in none."""

    text: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Interval:
        match = re.fullmatch(r"[\[(](\S+), (\S+)[\])]", text)
        assert match, text
        return cls(text, float(match[1]), float(match[2]))

    def __contains__(self, value: float) -> bool:
        above = value > self.low or (value == self.low and self.text[0] == "[")
        return above and (value < self.high or (value == self.high and self.text[-1] == "]"))


class Options:
    """Base of a group of options, whose values are checked when it is made.

    `at` is its place in a run's configuration, for messages: `class Crops(Options, at="method.crops")`.
    """

    at: ClassVar[str] = ""

    def __init_subclass__(cls, at: str = "", **rest: Any):
        super().__init_subclass__(**rest)
        cls.at = at or cls.at

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            within, value = field.metadata.get("within"), getattr(self, field.name)
            if within and value is not None:
                many = isinstance(value, tuple)
                interval = Interval.parse(within)
                if any(number not in interval for number in (value if many else (value,))):
                    raise self.wrong(field.name, f"{'values' if many else 'a value'} in {within}")
        self.check()

    def check(self) -> None:
        """Raise `self.wrong(...)` for what no interval says: options that do not fit each other."""

    def wrong(self, name: str, expected: str) -> InputError:
        """The error that an option's value is not what was expected."""
        value = getattr(self, name)
        text = repr(value) if isinstance(value, str) else value
        return InputError(f"{self.at}.{name}: expected {expected}, got {shown(text)}")


def shown(value: Any, most: int = SHOWN) -> str:
    """A value in a message, cut where it is long."""
    text = value if isinstance(value, str) else f"{value}"
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def section(default: Any, help: str) -> Any:
    """A dataclass field that holds a group of options."""
    return dataclasses.field(default_factory=lambda: default, metadata={"help": help})


def to_dict(options: Any) -> dict[str, Any]:
    """Nested plain values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


def from_dict(cls: type[T], values: dict[str, Any], path: str = "") -> T:
    """Build options from nested plain values; keys left out keep their defaults. Raises InputError: an
    unknown key (with a suggestion), or a value of the wrong type."""
    if not isinstance(values, dict):
        raise InputError(f"{path or 'options'}: expected an object of options, got {shown(values)}")
    values = _under_new_names(values, getattr(cls, "RENAMED", {}))
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(typing.cast(Any, cls))}
    arguments = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if key not in fields:
            raise _unknown(where, [f"{path}.{f}" if path else f for f in fields])
        sections = _sections(hints[key])
        arguments[key] = (
            section_from_dict(sections, value, where) if sections else _checked(hints[key], value, where)
        )
    return cls(**arguments)


def _under_new_names(values: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Nested values with the options that have other names now moved to them; values of new names win."""
    old = [key for key in _keys(values) if key in renamed]
    if not old:
        return values
    values = copy.deepcopy(values)
    for key in old:
        *parents, name = key.split(".")
        group = functools.reduce(dict.__getitem__, parents, values)
        *parents, new = renamed[key].split(".")
        place = functools.reduce(lambda inside, parent: inside.setdefault(parent, {}), parents, values)
        place.setdefault(new, group.pop(name))
    return values


def section_from_dict(classes: Sequence[type[T]], values: dict[str, Any], path: str) -> T:
    """As `from_dict`, of the one class, or of that which the value `kind` names (default: the first). Raises
    InputError: another kind, or as `from_dict`."""
    if len(classes) == 1 or not isinstance(values, dict) or "kind" not in values:
        return from_dict(classes[0], values, path)
    kinds = {typing.get_args(typing.get_type_hints(cls)["kind"])[0]: cls for cls in classes}
    if values["kind"] not in kinds:
        raise InputError(f"{path}.kind: expected one of {', '.join(kinds)}, got {values['kind']!r}")
    return from_dict(kinds[values["kind"]], values, path)


def _sections(hint: Any) -> list[type]:
    """The classes of options that a field may hold; none for a plain value."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if union else (hint,)
    return [kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


def override(options: T, assignments: Sequence[str] | Mapping[str, Any]) -> T:
    """Apply `dotted.key=value` assignments, or values by dotted keys.

    Text is JSON, or bare words; tuples may be written `0.3,1`. The beginning of a key may be left out, as all
    options have names of their own. Another `kind` gives its section the defaults of that kind, over which
    the other assignments win. Raises InputError: not an assignment, an unknown key (with a suggestion), or a
    value of the wrong type.
    """
    given = assignments.items() if isinstance(assignments, Mapping) else map(_assigned, assignments)
    pairs = [(getattr(options, "RENAMED", {}).get(key, key), value) for key, value in given]
    values = to_dict(options)
    for key, value in pairs:
        if key.rpartition(".")[2] == "kind":
            _change_kind(options, values, _whole_key(values, key), value)
    for key, value in pairs:
        group, name = _place(values, _whole_key(values, key))
        group[name] = _parse(value, group[name]) if isinstance(value, str) else value
    return from_dict(type(options), values)


def _assigned(assignment: str) -> tuple[str, str]:
    key, equals, text = assignment.partition("=")
    if not equals:
        raise InputError(f"expected an option KEY=VALUE, got {shown(assignment)!r}")
    return key, text


def _change_kind(options: Any, values: dict[str, Any], key: str, kind: str) -> None:
    """Give a section, whose key is `SECTION.kind`, the defaults of a kind if it is of another."""
    group, name = _place(values, key)
    if group[name] != kind:
        *parents, section, _ = key.split(".")
        for parent in parents:
            options = getattr(options, parent)
        sections = _sections(typing.get_type_hints(type(options))[section])
        group.clear()
        group.update(to_dict(section_from_dict(sections, {name: kind}, key.removesuffix(".kind"))))


def _whole_key(values: dict[str, Any], key: str) -> str:
    """The dotted key among nested values that is this one or ends with it."""
    known = list(_keys(values))
    meant = next((name for name in known if f".{name}".endswith(f".{key}")), None)
    if meant is None:
        raise _unknown(key, known)
    return meant


def _place(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The group among nested values that holds a dotted key, and its name there."""
    *parents, name = key.split(".")
    for parent in parents:
        values = values[parent]
    return values, name


def _keys(values: dict[str, Any], path: str = "") -> Iterator[str]:
    """The dotted keys of nested values."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{path}{name}.")
        else:
            yield path + name


def describe(options: Any, path: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Yield `(dotted key, type and bounds, value, help)` of every option."""
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        key = f"{path}.{field.name}" if path else field.name
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from describe(value, key)
        else:
            kind, within = _type_name(hints[field.name]), field.metadata.get("within")
            yield key, f"{kind} in {within}" if within else kind, value, field.metadata.get("help", "")


def differences(a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield `(dotted key, value, other value)` of the options in which two groups of one type differ."""
    for (key, _, left, _), (_, _, right, _) in zip(describe(a), describe(b), strict=True):
        if left != right:
            yield key, left, right


def first_difference(a: Any, b: Any, leave_out: Sequence[str] = ()) -> str | None:
    """The first difference of two groups but in options or groups left out: `key: value against value`."""
    for key, left, right in differences(a, b):
        if not any(key == name or key.startswith(f"{name}.") for name in leave_out):
            return f"{key}: {left} against {right}"
    return None


def nearest(key: str, known: Sequence[str]) -> str | None:
    """The one of some dotted keys that was probably meant: its last name, a part of that, or alike."""
    leaf = key.lower().rpartition(".")[2].replace("-", "_")
    leaves = {name: name.rpartition(".")[2] for name in known}
    same = [name for name in known if leaves[name] == leaf]
    part = [name for name in known if leaf in leaves[name].split("_")]
    alike = difflib.get_close_matches(leaf, leaves.values(), n=1, cutoff=0.7)
    close = [name for name in known if leaves[name] in alike]
    best = difflib.get_close_matches(key, close or known, n=1, cutoff=0.4 if close else 0.6)
    return next(iter([*same, *part, *best]), None)


def _unknown(key: str, known: Sequence[str]) -> InputError:
    if close := nearest(key, known):
        hint = f"; did you mean {close!r}?"
    else:
        hint = f"; expected one of {', '.join(known)}" if len(known) <= FEW else ""
    return InputError(f"unknown option {shown(key)!r}{hint}")


def _parse(text: str, current: Any) -> Any:
    if isinstance(current, list) and not text.startswith("["):
        return [_parse(part, None) for part in text.split(",") if part]
    if text.lower() in ("none", "true", "false"):
        text = {"none": "null"}.get(text.lower(), text.lower())
    if SHORT_FLOAT.fullmatch(text):
        return float(text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or an integer of thousands of digits, or nested as deep
        return text


def _checked(kind: Any, value: Any, where: str) -> Any:
    """The value as the declared type, or InputError."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        return _checked(next(k for k in inner if k is not type(None)), value, where)
    if origin is typing.Literal:
        value = "none" if value is None else value
        if value in inner:
            return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(_checked(k, v, where) for k, v in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and origin is None and type(value) is kind:
        return value
    raise InputError(f"{where}: expected {_type_name(kind)}, got {shown(repr(value))}")


def _type_name(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if k is type(None) else _type_name(k) for k in inner)
    if origin is typing.Literal:
        return "|".join(str(v) for v in inner)
    if origin is tuple:
        return ",".join("..." if k is Ellipsis else _type_name(k) for k in inner)
    return kind.__name__
