"""Settings that a model computes at its first call, and those that lie beside what it keeps in a dict.

What a call changes is a result of the call, and may change later: a counter, the last attention map. But a model may
also compute a setting once, as in ``if self.scale is None: self.scale = 2.0``, and read it ever after. A trace holds
it, so it may be what the call has made of it, or not computed yet, and nothing else. The same holds for a setting in a
dict that the model fills with other things: its results are those entries that a call was seen to change.

Only single numbers, texts and the like are looked at. What is computed from sizes is another one in a call of other
sizes, and is left out.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator
from typing import Any

from torchsurgeon.tracing.names import names_in, texts_in
from torchsurgeon.tracing.reading import Part, Reading
from torchsurgeon.tracing.results import ABSENT, is_single

_MOST_NAMED = 16


class _Computed(dict[str, Any]):
    """Attributes or entries that are computed at the first call; looked up, what each is computed to, unless changed.

    Args:
        table: the dict that holds them.
        settled: by their names, what they are before the first call and after.
    """

    def __init__(self, table: dict[str, Any], settled: dict[str, tuple[Any, Any]]) -> None:
        super().__init__(settled)
        self._table = table

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]

    def __getitem__(self, name: str) -> Any:
        before, after = super().__getitem__(name)
        now = self._table.get(name, ABSENT)
        return after if now is before or (is_single(now) and type(now) is type(before) and now == before) else now


class _Absent(dict[str, Any]):
    """Entries that a dict has not got, by their names; looked up, whether each is a single number or text by now."""

    def __init__(self, table: dict[Any, Any], names: Collection[str]) -> None:
        super().__init__(dict.fromkeys(names))
        self._table = table

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]

    def __getitem__(self, name: str) -> Any:
        now = self._table.get(name, ABSENT)
        return now if is_single(now) else ABSENT


def settled(reading: Reading) -> list[Part]:
    """Return the settings of a model that its first call computes, and those in dicts that its calls fill.

    Args:
        reading: what the model's call reads.
    """
    if reading.left is None:
        return []
    return [*_computed(reading), *_beside_results(reading)]


def _computed(reading: Reading) -> Iterator[Part]:
    assert reading.left is not None
    tables = [(path, vars(owner), owner) for path, owner in reading.owners if hasattr(owner, "__dict__")]
    tables += [(part.path, part.value, None) for part in reading.filled_dicts]
    done: set[int] = set()
    for path, table, holder in tables:
        if id(table) in done or not isinstance(table, dict):
            continue
        done.add(id(table))
        known = {
            key: values
            for (place, key), values in (reading.left.settled or {}).items()
            if place == id(table) and isinstance(key, str) and values is not None
        }
        of_holder = table is getattr(holder, "__dict__", None)
        read = {
            key: values
            for key, values in known.items()
            if not of_holder or (key in reading.names and not reading.overwrites(holder, key))
        }
        answers = _Computed(table, read)
        yield from (Part(f"{path}.{key}".lstrip("."), answers, key, answers[key], holder) for key in read)


def _beside_results(reading: Reading) -> Iterator[Part]:
    assert reading.left is not None
    for part in reading.filled_dicts:
        if id(part.value) not in reading.left.watched:
            continue
        changed = {
            key for place, key in (*reading.left.changed, *(reading.left.settled or ())) if place == id(part.value)
        }
        for key, value in part.value.items():
            if isinstance(key, str) and is_single(value) and key not in changed:
                yield Part(f"{part.path}.{key}", part.value, key, value, None)
        # A call that takes another path may fill in what the code names, and the model would read it ever after.
        functions = [function for function in reading.functions if _names(function, part)]
        named = {text for function in functions for text in texts_in(function.__code__)}
        absent = sorted(named - part.value.keys() - changed)[:_MOST_NAMED]
        answers = _Absent(part.value, absent)
        yield from (Part(f"{part.path}.{key}", answers, key, ABSENT, None) for key in absent)


def _names(function: types.FunctionType, part: Part) -> bool:
    names = names_in(function.__code__)
    return function is part.holder or part.key in names.read | names.globals
