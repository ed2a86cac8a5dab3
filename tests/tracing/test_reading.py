"""What a model's call reads, found from its code; and the text of code by which two machines compare it."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
import weakref
from collections import UserDict, UserList
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import model
from torch import Tensor, nn

from torchsurgeon.models.premises import Premises
from torchsurgeon.tracing.digests import part_digest, tensor_digest
from torchsurgeon.tracing.names import filled_by, names_in, overwritten_by
from torchsurgeon.tracing.reading import Reading, plain_tensors, read_model
from torchsurgeon.tracing.results import Left
from torchsurgeon.tracing.source import code_text, tree

SOURCE = '''
def act(y: "Tensor", by: int = 2) -> "Tensor":
    """Words."""
    # a comment
    def inner(z):
        return z * by
    return inner(y) + 1

pair = lambda y: y + 1, lambda y: y + 2
'''


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Imports a text as a Python module of its own, from a file of the same name each time."""
    count = iter(range(100))

    def load(text: str, name: str = "") -> Any:
        path = tmp_path / (name or f"written_{next(count)}.py")
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in [name for name in sys.modules if name.startswith("written_")]:
        del sys.modules[name]


def test_the_text_of_code_is_what_it_computes_not_where_it_stands(load: Callable[..., Any]) -> None:
    wanted = code_text(load(SOURCE).act.__code__)
    moved = SOURCE.replace("# a comment", "").replace('"""Words."""', '"""Other words."""').replace(': "Tensor"', "")
    assert code_text(load("import os\n\n\n" + moved).act.__code__) == wanted
    assert code_text(load(SOURCE.replace("z * by", "z / by")).act.__code__) != wanted
    assert code_text(load(SOURCE.replace("def act", "def other")).other.__code__) == wanted
    assert "cpython" not in wanted


def test_functions_on_one_line_are_told_apart(load: Callable[..., Any]) -> None:
    first, second = load(SOURCE).pair
    swapped = load(SOURCE.replace("y + 1, lambda y: y + 2", "y + 2, lambda y: y + 1")).pair
    assert code_text(first.__code__) == code_text(swapped[1].__code__)
    assert code_text(second.__code__) == code_text(swapped[0].__code__)
    assert code_text(first.__code__) != code_text(second.__code__)


def test_a_file_edited_since_it_was_imported_is_not_believed(load: Callable[..., Any]) -> None:
    old = load(SOURCE, "written_again.py").act
    before = code_text(old.__code__)
    new = load(SOURCE.replace("z * by", "z - by"), "written_again.py").act
    assert tree(new.__code__) is not None
    assert tree(old.__code__) is None
    assert code_text(old.__code__) not in (before, code_text(new.__code__))


def test_code_without_source_is_compared_by_its_bytecode() -> None:
    spaces: list[dict[str, Any]] = [{}, {}, {}]
    for space, text in zip(spaces, ("lambda y: y + 1", "lambda y: y + 1", "lambda y: y + 2"), strict=True):
        space["act"] = eval(text)  # noqa: S307
    one, same, other = (code_text(space["act"].__code__) for space in spaces)
    assert one == same
    assert one != other
    assert sys.implementation.cache_tag in one


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)
        self.used, self.unused, self.last = torch.ones(2), torch.ones(2), torch.ones(2)
        self.cache: dict[str, Tensor] = {}
        self.alias: list[Tensor] = []
        self.tables = {"a": [torch.ones(2)], "b": 3}
        self.me = [self]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.line(x) * self.used + self.tables["a"][0]
        self.last = y
        self.cache["x"] = x
        kept = self.alias
        kept.append(x)
        y[:, 0] = self.other()
        return y

    def other(self) -> float:
        return len(self.me[0].tables)


def test_a_reading_has_what_the_code_names_and_not_what_it_computes() -> None:
    reader = Reader()
    reader(torch.ones(1, 2))
    reading = read_model(reader)
    assert set(plain_tensors(reader, reading)) == {"used", "tables['a'][0]"}
    paths = {part.path for part in reading.parts}
    assert {"Reader.forward", "Reader.other", "tables", "me"} <= paths
    assert not {"unused", "last", "cache", "alias"} & paths
    assert {"last"} <= reading.assigned
    assert {"cache", "alias"} <= reading.filled


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale_1 = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 2):
            x = x * getattr(self, f"scale_{i}")
        return x


def test_attributes_whose_names_are_computed_are_read_too() -> None:
    assert set(plain_tensors(ByName(), read_model(ByName()))) == {"scale_1"}


IMPORTING = {
    "import": "import read_pack.inner; return x * read_pack.inner.SCALE",
    "import as": "import read_pack.inner as inner; return x * inner.SCALE",
    "from": "from read_pack.inner import SCALE; return x * SCALE",
    "from the package": "from read_pack import inner; return x * inner.SCALE",
    "relative": "from .inner import SCALE; return x * SCALE",
    "relative, of the package": "from . import inner; return x * inner.SCALE",
    "by a text": "return x * importlib.import_module('read_pack.inner').SCALE",
    "globals": "return x * globals()['SCALE']",
    "globals, get": "return x * globals().get('SCALE')",
}


@pytest.mark.parametrize("body", IMPORTING.values(), ids=IMPORTING)
def test_what_a_function_imports_while_it_runs_is_read(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, inner = types.ModuleType("read_pack"), types.ModuleType("read_pack.inner")
    package.inner, inner.SCALE, inner.OTHER = inner, 2.0, 3.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "read_pack", package)
    monkeypatch.setitem(sys.modules, "read_pack.inner", inner)
    space: dict[str, Any] = {"__name__": "read_pack.code", "__package__": "read_pack", "SCALE": 2.0}
    exec(f"import importlib\ndef act(x): {body}", space)  # noqa: S102
    found = [part for part in Reading({}, {"act": space["act"]}).parts if part.key == "SCALE"]
    (part,) = found
    assert part.owner is (space if "globals" in body else vars(inner))
    assert space["act"](1) == 2.0


def test_an_import_that_nobody_has_made_or_that_leads_nowhere_is_left_out() -> None:
    space: dict[str, Any] = {"__name__": "alone"}
    exec("def act(x):\n    from . import a\n    from ...b import c\n    import not_there.at_all, torch.fx", space)  # noqa: S102
    assert [part.path for part in Reading({}, {"act": space["act"]}).parts] == ["act"]


def test_an_installed_module_that_may_not_have_been_imported_is_watched_but_not_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = types.ModuleType("installed_for_a_test")
    installed.__file__, installed.SCALE = "/lib/site-packages/installed_for_a_test.py", 2.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, installed.__name__, installed)
    space: dict[str, Any] = {"__name__": "alone"}
    exec("def act(x):\n    from installed_for_a_test import SCALE", space)  # noqa: S102
    found = Reading({}, {"act": space["act"]}, left=Left(frozenset(), frozenset(), frozenset()))
    assert [part.path for part in found.parts] == ["act", "installed_for_a_test.SCALE"]
    assert [part.path for part in Reading({}, {"act": space["act"]}).parts] == ["act"]


def test_attributes_of_weights_are_read_where_the_code_names_them() -> None:
    made: Any = model(lambda self, x: self.part(x) * self.part.weight.scale, part=nn.Linear(4, 4), held=torch.ones(2))
    made.part.weight.scale, made.part.weight.unused, made.held.scale = 2.0, 1.0, 3.0
    found = {part.path: part.value for part in read_model(made).parts if part.key in ("scale", "unused")}
    assert found == {"held.scale": 3.0, "part.weight.scale": 2.0}
    premises = Premises(made)
    made.part.weight.scale = 4.0
    assert "attribute 'scale' of 'part.weight' was 2.0" in str(premises.broken())


def test_what_lies_in_dicts_and_lists_of_users_is_read() -> None:
    made: Any = model(lambda self, x: x * self.table["scale"] * self.row[0])
    made.table, made.row = UserDict(scale=2.0), UserList([1.0])
    premises = Premises(made)
    assert premises.hold()
    made.table["scale"] = 3.0
    assert "what 'table.data' of the model holds has changed" in str(premises.broken())
    made.table["scale"] = 2.0
    made.row.append(1.0)
    assert "what 'row.data' of the model holds has changed" in str(premises.broken())


def test_what_a_weak_reference_refers_to_is_read() -> None:
    held, module = torch.ones(2), model(lambda self, x: x * self.me())
    module.me = weakref.ref(held)
    assert set(plain_tensors(module, read_model(module))) == {"me.__call__()"}


def test_what_a_function_assigns_and_fills_is_known_by_the_way_there() -> None:
    def forward(self: Any, x: Any, *, other: Any = None) -> Any:
        self.plain, self.pair = x
        self.counted += 1
        self.box.count -= 1
        self.parts[0].inside = 1
        for self.each in x:
            del self.gone
        out = x.make()
        out.marked = x.scale
        [other.late for _ in x]
        self.kept[x] = self.box.table.setdefault(x, [])
        held = self.held
        held["a"].append(x)
        self.parts[0].list.append(x)
        KEPT[x] = x

        def inner() -> None:
            self.nested = other

        return inner

    names, filled = names_in(forward.__code__), filled_by(forward.__code__)
    one = {("plain",), ("pair",), ("counted",), ("each",), ("gone",), ("nested",)}
    assert (names.own, names.elsewhere) == (one | {("box", "count")}, {"inside", "marked"})
    assert names.assigned == {way[-1] for way in names.own} | names.elsewhere
    assert filled == ({("kept",), ("box", "table"), ("held",)}, {"KEPT"}, {"list"})


KEPT: dict[Any, Any] = {}


def test_what_a_function_assigns_whenever_it_is_called_is_known() -> None:
    def forward(self: Any, x: Any, y: Any) -> Any:
        self.always, (self.pair, self.box.inside) = x, y
        self.counted = self.counted + 1
        if x:
            self.branch = y
            if self.early:
                raise ValueError
        with self.lock as self.late:
            self.held = self.always
        for self.each in y:
            self.loop = y
        self.early = x
        if y:
            return None
        self.last = x
        return x

    assert overwritten_by(forward.__code__) == {("always",), ("pair",), ("box", "inside"), ("held",)}
    assert overwritten_by((lambda self: self.x).__code__) == frozenset()


def test_a_reading_ends_in_circles_and_in_the_deep() -> None:
    class Node:
        def __init__(self) -> None:
            self.next: Any = self
            self.many = [[torch.ones(1) for _ in range(300)] for _ in range(300)]

    class Circular(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x * self.node.next.many[0][0]

    module = Circular()
    module.node = Node()
    reading = read_model(module)
    assert not reading.complete
    again = read_model(module)
    assert [part.path for part in again.parts] == [part.path for part in reading.parts]


def test_what_wraps_a_function_is_looked_into() -> None:
    def digests(act: Any) -> list[str]:
        return [part_digest(part) for part in Reading({}, {"act": act}).parts]

    def times(by: float) -> Any:
        return lambda y: y * by

    makers: list[Callable[[float], Any]] = [
        times,
        lambda by: functools.partial(torch.mul, other=by),
        lambda by: types.MethodType(lambda self, y: y * self, by),
        lambda by: torch.no_grad()(times(by)),
        lambda by: functools.lru_cache(times(by)),
        lambda by: staticmethod(times(by)),
    ]
    for make in makers:
        assert digests(make(2.0)) == digests(make(2.0))
        assert digests(make(2.0)) != digests(make(3.0))


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning", "ignore:Sparse CSR:UserWarning")
def test_digests_of_unusual_tensors() -> None:
    values = torch.arange(6.0).reshape(2, 3)

    def quantized(scale: float) -> Tensor:
        return torch._empty_affine_quantized([2, 3], scale=scale, zero_point=0, dtype=torch.qint8).fill_(0)

    pairs = [
        (values.to_sparse(), (2 * values).to_sparse()),
        (values.to_sparse_csr(), (values + 1).to_sparse_csr()),
        (torch.complex(values, values).conj(), torch.complex(values, values)),
        (values.to(torch.float8_e4m3fn), (values + 1).to(torch.float8_e4m3fn)),
        (values.to("meta"), values[:1].to("meta")),
    ]
    for one, other in pairs:
        assert tensor_digest(one) == tensor_digest(one.clone())
        assert tensor_digest(one) != tensor_digest(other)
    assert tensor_digest(quantized(0.5)) != tensor_digest(quantized(0.25))
