"""The configuration file of ``torchsurgeon serve``: its options and models as TOML."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchsurgeon.errors import ServerError, short

# The options that take NAME=VALUE stand in the table of the model with that name.
_OF_A_MODEL = ("weights", "input", "leaf", "codec", "backend", "backend-sample", "backend-limits")
_SPEC = "spec"
_MODELS = "models"
_NOT_IN_A_FILE = ("help", "config", "check")


def with_file(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Return arguments with those of the file that ``--config`` names before them, so that the others win.

    The SPECs of the file's models become the default of the parser's ``file_models``, since argparse does not allow
    arguments without a name in two places.

    Args:
        parser: the command's parser.
        arguments: the arguments of the command line.

    Raises:
        ServerError: the file cannot be read, is no TOML, or has a key or a value that is not valid.
    """
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config", action="append", default=[])
    files = finder.parse_known_args(arguments)[0].config
    if not files:
        return list(arguments)
    if len(files) > 1:
        raise ServerError(f"--config takes one file; it is given {len(files)} times")
    return [*_arguments_of(parser, files[0]), *arguments]


def _arguments_of(parser: argparse.ArgumentParser, file: str) -> list[str]:
    actions = {
        option[2:]: action for action in parser._actions for option in action.option_strings if option.startswith("--")
    }
    known = {
        name: action
        for name, action in actions.items()
        # Of --batching and --no-batching, one key is enough.
        if name not in (*_OF_A_MODEL, *_NOT_IN_A_FILE) and not (name.startswith("no-") and name[3:] in actions)
    }
    found: list[str] = []
    for key, value in _read(file).items():
        if key == _MODELS:
            models, options = _of_models(_table(value, _MODELS, file), file)
            parser.set_defaults(file_models=models)
            found += options
            continue
        _check_key(key, [*known, _MODELS], file, "")
        found += _of_option(key, value, known[key], file)
    return found


def _read(file: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"the configuration {short(file)} cannot be read: {short(error)}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ServerError(f"the configuration {short(file)} is not valid TOML: {short(error)}") from error


def _of_option(key: str, value: object, action: argparse.Action, file: str) -> list[str]:
    """Return one option as arguments, once its value has been checked as the command line's would be."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ServerError(f"{key} in {short(file)} must be true or false; got {short(value)}")
        if isinstance(action, argparse.BooleanOptionalAction):
            return [f"--{key}" if value else f"--no-{key}"]
        return [f"--{key}"] if value else []
    parse: Callable[[str], object] | None = action.type if callable(action.type) else None
    if parse is None and not isinstance(value, str):
        raise ServerError(f"{key} in {short(file)} must be a text; got {short(value)}")
    if parse is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ServerError(f"{key} in {short(file)} must be a number; got {short(value)}")
    try:
        if parse is not None:
            parse(str(value))
    except argparse.ArgumentTypeError as error:
        raise ServerError(f"{key} in {short(file)} {error}") from None
    if action.choices is not None and value not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise ServerError(f"{key} in {short(file)} must be one of {choices}; got {short(value)}")
    return [f"--{key}={value}"]


def _of_models(models: Mapping[str, object], file: str) -> tuple[dict[str, str], list[str]]:
    """Return the SPECs of models by name, and what else is said of them as arguments."""
    found: dict[str, str] = {}
    options = []
    for name, given in models.items():
        where = f"{_MODELS}.{name}"
        table = {_SPEC: given} if isinstance(given, str) else _table(given, where, file)
        for key, value in table.items():
            _check_key(key, (_SPEC, *_OF_A_MODEL), file, f"{where}.")
            repeats = key in ("leaf", "codec")
            for one in value if repeats and isinstance(value, list) else [value]:
                if not isinstance(one, str) or not one:
                    kind = "a text, or a list of texts" if repeats else "a text"
                    raise ServerError(f"{where}.{key} in {short(file)} must be {kind}; got {short(value)}")
                if key == _SPEC:
                    found[name] = one
                else:
                    options.append(f"--{key}={name}={one}")
    return found, options


def _table(value: object, key: str, file: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ServerError(f"{key} in {short(file)} must be a table, as [{key}] begins one; got {short(value)}")
    return value


def _check_key(key: str, known: Sequence[str], file: str, where: str) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
    hint = f"did you mean {where}{near[0]}?" if near else f"there are {', '.join(sorted(known))}"
    raise ServerError(f"{short(file)} has an unknown key {short(where + key, quote=False)}; {hint}")
