"""Small models of any kind, each put together at random from the fragments in ``fragments/`` as Python source.

``random_model(seed)`` is a ``RandomModel``, whose ``load()`` executes its source: a fresh copy each time, with equal
weights. It runs in eager PyTorch, twice with the same answer, or it would not have been returned.

A fragment begins with a line ``# name``. What the other lines hold is said by how they begin:

    !  the top of the module                    =  the body of the class Root
    +  ``__init__``                             >  what is done to ``model``, after it was made
    ~  what is done once for the process        :  the signature, the call, or the result

All other lines stand in ``forward`` and turn ``x`` of shape (batch, length, 8) into another of this shape. ``@n`` is a
number that no other fragment has, ``@k`` a constant, ``@P`` a condition, ``@N`` a number that follows from sizes.
``@BODY`` is where the statements of a wrapper's children stand, ``@INIT`` what these have in ``__init__``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import linecache
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

_FOLDER = Path(__file__).parent / "fragments"
_MODULE = "random_model"
_FOLDED = {"!": "top", "+": "init", "=": "members", ">": "after", "~": "process", ":": "result"}
_WEIGHTS = {
    "branches": 8,
    "uses": 5,
    "contexts": 2,
    "blocks": 2,
    "state": 2,
    "hook": 2,
    "layer": 2,
    "in_place": 2,
    "values": 1,
    "constant": 1,
    "container": 2,
    "gradient": 1,
    "modules": 2,
}
_WRAPPERS = ("contexts", "blocks")


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A named group of lines, by what they belong to."""

    name: str
    body: tuple[str, ...] = ()
    top: tuple[str, ...] = ()
    init: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    process: tuple[str, ...] = ()
    result: tuple[str, ...] = ()

    @property
    def holds_others(self) -> bool:
        return any("@BODY" in line for line in (*self.body, *self.top))


def _fragments(kind: str) -> dict[str, Fragment]:
    found: dict[str, Fragment] = {}
    for text in (_FOLDER / f"{kind}.txt").read_text().split("\n\n"):
        title, *lines = text.rstrip("\n").split("\n")
        parts: dict[str, list[str]] = {"body": []}
        for line in lines:
            part = _FOLDED.get(line[0]) if line[1:2] in (" ", "") else None
            parts.setdefault(part or "body", []).append(line[2:] if part else line)
        name = f"{kind}: {title.removeprefix('# ')}"
        found[name] = Fragment(name, **{part: tuple(text) for part, text in parts.items()})
    return found


def _conditions() -> dict[str, list[str]]:
    texts = (_FOLDER / "conditions.txt").read_text().split("\n\n")
    return {title[2:]: lines for title, *lines in (text.strip("\n").split("\n") for text in texts)}


STATEMENTS = {kind: _fragments(kind) for kind in _WEIGHTS}
SIGNATURES, OUTPUTS, ROOTS = (list(_fragments(kind).values()) for kind in ("signatures", "outputs", "roots"))
CONDITIONS = _conditions()
NUMBERS = (_FOLDER / "numbers.txt").read_text().splitlines()
BASE = "def base():\n    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(7))\n\n\n"
NO_PROCESS = "def process():\n    handles = []\n    return handles\n\n\n"
PRELUDE = (_FOLDER / "prelude.txt").read_text()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A fragment in one place of a model; ``seed`` decides its constants, conditions and numbers."""

    fragment: Fragment
    seed: int
    children: tuple[Piece, ...] = ()


class _Writer:
    """Collects the lines of all pieces, and the names of what they use."""

    def __init__(self) -> None:
        self.used: list[str] = []
        self.top: list[str] = []
        self.members: list[str] = []
        self.after: list[str] = []
        self.process: list[str] = []
        self._numbers = itertools.count()

    def write(self, piece: Piece) -> tuple[list[str], list[str]]:
        """Return what the piece has in ``forward`` and in ``__init__``; the rest goes to this object's lists."""
        children = [self.write(child) for child in piece.children]
        body = [line for lines, _ in children for line in lines]
        init = [line for _, lines in children for line in lines]
        fill = self._filler(piece)
        has_init = any("@INIT" in line for line in piece.fragment.top)
        inner = {"@BODY": body or ["pass"], "@INIT": init or ["pass"]}
        self.top += _spliced(map(fill, piece.fragment.top), inner)
        self.members += map(fill, piece.fragment.members)
        self.after += map(fill, piece.fragment.after)
        self.process += map(fill, piece.fragment.process)
        own = [fill(line) for line in piece.fragment.init]
        return _spliced(map(fill, piece.fragment.body), inner), own if has_init else init + own

    def _filler(self, piece: Piece) -> Callable[[str], str]:
        chance = random.Random(piece.seed)
        number, constant = str(next(self._numbers)), repr(chance.choice((0.5, -1.0, 1.5, 2.0, 3.0)))
        self.used.append(piece.fragment.name)

        def fill(line: str) -> str:
            while "@P" in line:
                kind = chance.choice(list(CONDITIONS))
                text = chance.choice(CONDITIONS[kind])
                self.used.append(f"{kind}: {text}")
                line = line.replace("@P", text, 1)
            while "@N" in line:
                text = chance.choice(NUMBERS)
                self.used.append(f"number: {text}")
                line = line.replace("@N", f"({text})", 1)
            return line.replace("@n", number).replace("@k", constant)

        return fill


def _spliced(lines: Iterator[str], inner: dict[str, list[str]]) -> list[str]:
    written = []
    for line in lines:
        key = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        written += [indent + text for text in inner[key]] if key in inner else [line]
    return written


def _indented(lines: list[str], by: int) -> str:
    return "".join(f"{' ' * by}{line}\n" for line in lines)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """The pieces of a model, from which its source follows.

    Attributes:
        seed: from which it was drawn, and that of its weights.
        pieces: the statements of ``forward``.
        roots: what is done to the whole model.
        signature: how it is called.
        output: what it returns.
    """

    seed: int
    pieces: tuple[Piece, ...]
    roots: tuple[Piece, ...]
    signature: Fragment
    output: Fragment

    @property
    def uses(self) -> list[str]:
        """The names of fragments, conditions and numbers in the source."""
        return self._written()[1]

    @property
    def source(self) -> str:
        """The model as a module of Python."""
        return self._written()[0]

    def _written(self) -> tuple[str, list[str]]:
        writer = _Writer()
        body, init = writer.write(Piece(Fragment("", ("@BODY",)), 0, self.pieces))
        for piece in self.roots:
            writer.write(piece)
        parameters, call = self.signature.result[0].split(" | ")
        shown = [self.signature, self.output]
        used = [
            *(name for name in writer.used if name),
            *(f.name for f in shown if f not in (SIGNATURES[0], OUTPUTS[0])),
        ]
        top = [*writer.top, *self.output.top]
        text = f"{PRELUDE}\n\n{_indented(top, 0)}\n\nclass Root(nn.Module):\n{_indented(writer.members, 4)}"
        text += f"    def __init__(self):\n        super().__init__()\n{_indented(init, 8)}\n"
        text += f"    def forward(self, {parameters}):\n{_indented([*self.signature.body, *body], 8)}"
        text += f"        return {self.output.result[0]}\n\n\n"
        text += BASE
        text += f"def call(x):\n    return {call}\n\n\n"
        text += NO_PROCESS.replace("    return", f"{_indented(writer.process, 4)}    return")
        text += f"def make():\n    torch.manual_seed({self.seed})\n    CALL = call(base() - 1)\n"
        text += f"    model = Root().eval()\n{_indented(writer.after, 4)}    return model.eval()\n"
        return text, used

    def load(self) -> types.ModuleType:
        """Execute the source. The result's ``make()`` makes the model, ``call(x)`` are its arguments."""
        source, name = self.source, f"<random model {self.seed}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        module = types.ModuleType(_MODULE)
        sys.modules[_MODULE] = module  # where pickle and dataclasses look for its classes
        exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102 - source of the fragments beside this file
        return module

    def smaller(self) -> Iterator[RandomModel]:
        """The models in which one piece is left out, or replaced by its children."""
        for pieces in _without_one(self.pieces):
            yield dataclasses.replace(self, pieces=pieces)
        for i in range(len(self.roots)):
            yield dataclasses.replace(self, roots=self.roots[:i] + self.roots[i + 1 :])
        if self.signature != SIGNATURES[0]:
            yield dataclasses.replace(self, signature=SIGNATURES[0])
        if self.output != OUTPUTS[0]:
            yield dataclasses.replace(self, output=OUTPUTS[0])


def _without_one(pieces: tuple[Piece, ...]) -> Iterator[tuple[Piece, ...]]:
    for i, piece in enumerate(pieces):
        before, after = pieces[:i], pieces[i + 1 :]
        yield before + after
        if piece.children:
            yield before + piece.children + after
        for children in _without_one(piece.children):
            yield (*before, dataclasses.replace(piece, children=children), *after)


# --- drawing ---


def random_model(seed: int) -> RandomModel:
    """Return the model of this seed."""
    chance = random.Random(seed)
    linear = STATEMENTS["layer"]["layer: linear"]
    pieces = [_piece(chance, depth=0) for _ in range(chance.choice((1, 1, 2, 2, 3, 4, 5)))]
    # A layer at a random place, so that there is always something to cut after.
    pieces.insert(chance.randint(0, len(pieces)), Piece(linear, 0))
    roots = [Piece(chance.choice(ROOTS), chance.getrandbits(32)) for _ in range(chance.choice((0, 0, 0, 1, 2)))]
    signature = chance.choice(SIGNATURES) if chance.random() < 0.3 else SIGNATURES[0]
    output = chance.choice(OUTPUTS) if chance.random() < 0.3 else OUTPUTS[0]
    return possible(RandomModel(seed, tuple(pieces), tuple(roots), signature, output))


def _piece(chance: random.Random, depth: int) -> Piece:
    kinds = [kind for kind in _WEIGHTS if depth < 2 or kind not in _WRAPPERS]
    kind = chance.choices(kinds, [_WEIGHTS[kind] for kind in kinds])[0]
    fragment = chance.choice(list(STATEMENTS[kind].values()))
    count = chance.choice((1, 1, 2, 3)) if fragment.holds_others else 0
    return Piece(fragment, chance.getrandbits(32), tuple(_piece(chance, depth + 1) for _ in range(count)))


def possible(model: RandomModel) -> RandomModel:
    """Return the model without the pieces that eager PyTorch refuses, or with which its answers are not its own."""
    if is_repeatable(model):
        return model
    bare = dataclasses.replace(model, pieces=(), roots=())
    kept = bare if is_repeatable(bare) else dataclasses.replace(bare, signature=SIGNATURES[0], output=OUTPUTS[0])
    for piece in model.pieces:
        for form in (piece, *(dataclasses.replace(piece, children=c) for c in _without_one(piece.children))):
            more = dataclasses.replace(kept, pieces=(*kept.pieces, form))
            if is_repeatable(more):
                kept = more
                break
    for piece in model.roots:
        more = dataclasses.replace(kept, roots=(*kept.roots, piece))
        kept = more if is_repeatable(more) else kept
    return kept


def is_repeatable(model: RandomModel) -> bool:
    """Return whether two fresh models run the example, and a second call, with the same answers."""
    try:
        answers = [_answers(model) for _ in range(2)]
    except Exception:
        return False
    return not difference(*answers)


def _answers(model: RandomModel) -> list[Any]:
    with surroundings(), as_process(module := model.load()), torch.no_grad():
        made = module.make()
        found = []
        for x in (module.base(), module.base() + 1):
            args, kwargs = module.call(x)
            reseed()
            found.append(made(*args, **kwargs))
        return found


@contextlib.contextmanager
def as_process(module: types.ModuleType) -> Iterator[None]:
    """Do what a model's source does once for the process (hooks of all modules), and take it back at the end."""
    handles = module.process()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """Leave PyTorch's settings as they were, whatever an interrupted ``forward`` did to them, and be silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)


def reseed() -> None:
    """Let all random numbers begin anew, so that two runs of a model that draws them can be compared."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def difference(ours: Any, theirs: Any, where: str = "the result") -> str:
    """Return how two results differ, in type, structure, dtype, shape or one bit; nothing where they do not."""
    # By name, because every loaded copy of a model has classes of its own.
    if type(ours).__qualname__ != type(theirs).__qualname__ and not isinstance(theirs, nn.Parameter):
        return f"{where} is {type(ours).__name__} instead of {type(theirs).__name__}"
    if isinstance(theirs, torch.Tensor):
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return f"{where} is {ours.dtype} {list(ours.shape)} instead of {theirs.dtype} {list(theirs.shape)}"
        return "" if torch.equal(_bits(ours), _bits(theirs)) else f"{where} has other values"
    if dataclasses.is_dataclass(theirs) or isinstance(theirs, types.SimpleNamespace):
        ours, theirs = vars(ours), vars(theirs)
    if isinstance(theirs, dict):
        if list(ours) != list(theirs):
            return f"{where} has the keys {list(ours)} instead of {list(theirs)}"
        pairs = [(key, ours[key], theirs[key]) for key in theirs]
    elif isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            return f"{where} has {len(ours)} parts instead of {len(theirs)}"
        pairs = [(i, *pair) for i, pair in enumerate(zip(ours, theirs, strict=True))]
    else:
        return "" if ours == theirs else f"{where} is {ours!r} instead of {theirs!r}"
    return next((text for key, a, b in pairs if (text := difference(a, b, f"{where}[{key!r}]"))), "")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.flatten().view(torch.uint8)
