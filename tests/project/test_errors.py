"""Errors quote what the user gave, short and readable."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from torchsurgeon import errors
from torchsurgeon.errors import short


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("lte", "'lte'"),
        ("it's\n", '"it\'s\\n"'),
        ((0, 1), "(0, 1)"),
        (None, "None"),
        (1.5, "1.5"),
        (Path("a b/model.pt"), "a b/model.pt"),
        (OSError("disk full"), "disk full"),
        (ValueError(), ""),
        (str, "str"),
        (len, "len"),
        (Path, f"{Path.__module__}.Path"),
        (inspect.signature, "inspect.signature"),
        (str.join, "str.join"),
        ([object()], "[<object object>]"),
        ({"f": lambda: 0}, "{'f': <function <lambda>>}"),
    ],
)
def test_short_quotes_a_value(value: object, quoted: str) -> None:
    assert short(value) == quoted


def test_short_leaves_out_quotation_marks_where_asked() -> None:
    assert short("no such file", quote=False) == "no such file"
    assert short(["a"], quote=False) == "['a']"


@pytest.mark.parametrize("value", ["x" * 500_000, list(range(10_000)), OSError("y" * 1000), Path("z/" * 1000)])
@pytest.mark.parametrize("limit", [10, 300])
def test_short_leaves_out_the_middle_of_a_long_value(value: object, limit: int) -> None:
    quoted = short(value, limit)
    whole = str(value) if isinstance(value, OSError | Path) else repr(value)
    begin, end = quoted.split("…")
    assert len(quoted) == limit
    assert whole.startswith(begin)
    assert whole.endswith(end)
    assert begin
    assert end


def test_every_error_and_warning_is_drawn_in_the_tree_below_its_base() -> None:
    above: list[str] = []
    drawn: dict[str, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        indent = len(line) - len(line.lstrip(" │├└─"))
        name = line[indent:].partition(" ")[0]
        if inspect.isclass(getattr(errors, name, None)) or name == "UserWarning":
            above[(indent - 4) // 4 :] = [name]
            drawn[name] = above[-2] if len(above) > 1 else kind_of(name).__bases__[0].__name__
    defined = [name for name, kind in vars(errors).items() if inspect.isclass(kind)]
    assert drawn == {name: kind_of(name).__bases__[0].__name__ for name in [*defined, "UserWarning"]}


def kind_of(name: str) -> type:
    return UserWarning if name == "UserWarning" else getattr(errors, name)
