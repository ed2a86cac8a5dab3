"""JSON files: written as a whole or not at all, and read with errors that name the file and what is wrong with it."""

from __future__ import annotations

import json
import numbers
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torchsurgeon import _whole_file
from torchsurgeon.errors import TorchSurgeonError, is_finite, is_whole, short

T = TypeVar("T")
ErrorClass = type[TorchSurgeonError]
# Larger values in a file are mistakes: seconds, bytes and joules of one inference are far below.
_MOST = 1e18
# By the name of a format, between the package's name and its version: what the file holds, and what writes it.
_KINDS = {
    "profile": "a profile (torchsurgeon profile)",
    "predictor": "a calibration (torchsurgeon calibrate)",
    "codecs": "a codec table (torchsurgeon codecs --out)",
    "frontier": "a frontier (torchsurgeon plan --frontier)",
    "load": "a load test (torchsurgeon bench-server --json)",
    "graph": "a model's layers (torchsurgeon trace --json)",
}


class Rule(NamedTuple):
    """What a field of a file must hold.

    Attributes:
        text: what that is, as the message of an error says it ("a whole number").
        holds: returns whether a value is so.
    """

    text: str
    holds: Callable[[Any], bool]

    def or_null(self) -> Rule:
        """Return the rule that also allows ``null``."""
        return Rule(f"{self.text}, or null", lambda value: value is None or self.holds(value))


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and is_finite(value)


WHOLE = Rule(f"a whole number from 0 to {_MOST:g}", lambda value: is_whole(value) and 0 <= value <= _MOST)
AMOUNT = Rule(f"a number from 0 to {_MOST:g}", lambda value: _is_number(value) and 0 <= value <= _MOST)
NUMBER = Rule(f"a number within ±{_MOST:g}", lambda value: _is_number(value) and abs(value) <= _MOST)
TEXT = Rule("a text", lambda value: isinstance(value, str))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXTS = Rule("a list of texts", lambda value: isinstance(value, list | tuple) and all(map(TEXT.holds, value)))
WHOLES = Rule("a list of whole numbers", lambda value: isinstance(value, list | tuple) and all(map(WHOLE.holds, value)))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
OBJECTS = Rule("a list of objects", lambda value: isinstance(value, list | tuple) and all(map(OBJECT.holds, value)))


def check_fields(data: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Check the fields of an object of a file.

    Args:
        data: the object.
        rules: what its fields must hold, by name.

    Raises:
        KeyError: a field is missing.
        ValueError: a field holds something else.
    """
    for name, rule in rules.items():
        if not rule.holds(data[name]):
            raise ValueError(f"{name} must be {rule.text}; got {short(data[name], 100)}")


def write(path: str | Path, data: Any, error: ErrorClass) -> None:
    """Write ``data`` as JSON. After an interruption the file holds the old data or the new, but never a part.

    Args:
        path: the file.
        data: what ``json.dumps`` accepts.
        error: the class that is raised where the file cannot be written.
    """
    _whole_file.write(path, json.dumps(data, separators=(",", ":"), allow_nan=False).encode("utf-8"), error)


def read(path: str | Path, error: ErrorClass, remedy: str) -> Any:
    """Return the data in a JSON file.

    Args:
        path: the file.
        error: the class that is raised where the file cannot be read or is not JSON.
        remedy: what the error advises for a file that is not JSON, such as "measure it again".
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{short(Path(path))} cannot be read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        what = short(problem, 100)
        raise error(f"{short(Path(path), 200)} is not JSON, or was cut short ({what}); {remedy}") from None


def check_format(data: Any, wanted: str, error: ErrorClass, what: str, remedy: str) -> None:
    """Check that ``data`` says that it is of one version of one format.

    Args:
        data: what the file holds.
        wanted: the name and version of the format.
        error: the class that is raised where ``data`` is of another.
        what: what has that format, as the message names it ("a profile").
        remedy: what the message advises.
    """
    if not isinstance(data, dict):
        raise error(f"{what} must be a JSON object; got a {type(data).__name__}; {remedy}")
    given = data.get("format")
    if given == wanted:
        return
    needed, held = (_KINDS.get(str(one).removeprefix("torchsurgeon.").partition("/")[0]) for one in (wanted, given))
    if needed is not None and held is not None and needed != held:
        raise error(f"{needed} is needed here, and this is {held}; give the file of the former")
    raise error(f"the format of {what} must be {wanted!r}; got {short(given)}; {remedy}")


def field(data: Mapping[str, Any], name: str, make: Callable[[Any], T], rule: str, error: ErrorClass, remedy: str) -> T:
    """Return what ``make`` makes of one field of ``data``.

    Args:
        data: an object of the file.
        name: the name of the field.
        make: returns what the field holds; raises where it holds something else.
        rule: what the field must hold, as the message says it ("a whole number").
        error: the class that is raised where the field is missing or ``make`` raises.
        remedy: what the message advises.
    """
    if name not in data:
        raise error(f"there is no field {name!r}; the file was cut short or edited: {remedy}")
    try:
        return make(data[name])
    except error:
        raise
    except KeyError as missing:
        raise error(f"{name} has no field {short(missing)}; the file was cut short or edited: {remedy}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise error(f"{name} must be {rule}; got {short(data[name], 100)}; {remedy}") from None


def load(path: str | Path, parse: Callable[[Any], T], error: ErrorClass, remedy: str) -> T:
    """Return what ``parse`` makes of the data in a JSON file; an ``error`` that it raises then names the file.

    Args:
        path: the file.
        parse: turns the data into what is returned.
        error: as in ``read()``.
        remedy: as in ``read()``.
    """
    data = read(path, error, remedy)
    try:
        return parse(data)
    except error as problem:
        raise error(f"{short(Path(path))}: {problem}") from None
