"""A part of a traced model as an ordinary module.

Heads and tails are slices of the same compiled steps, so cutting a graph at another point copies and compiles nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from torchsurgeon.tracing.layout import Layout
from torchsurgeon.tracing.step import Constant, Environment, Step, clone, number_to_tensor
from torchsurgeon.tracing.structure import LeafPath, flatten


@dataclasses.dataclass(frozen=True)
class Feed:
    """How a tensor that a segment is given becomes the value of a step, or a part of one.

    Attributes:
        step: the index of the step that gives the value in the whole model.
        path: which leaf of that step's value the tensor is; empty when it is the whole value.
        restore: turns the tensor into what the model has at this place: a number, or a tensor of another layout.
        clone: whether a step of the segment overwrites the tensor, which belongs to the caller and so is copied first.
    """

    step: int
    path: LeafPath = ()
    restore: Callable[[torch.Tensor], Any] | None = None
    clone: bool = False


@dataclasses.dataclass(frozen=True)
class Pick:
    """One output of a segment: a leaf of a step's value, as a tensor.

    Attributes:
        step: the index of the step.
        path: which leaf of the step's value it is; empty when it is the whole value.
    """

    step: int
    path: LeafPath = ()

    def __call__(self, environment: Environment) -> torch.Tensor:
        """Return the output from the values of all steps; a number becomes the tensor that carries it."""
        value = environment[self.step]
        if self.path:
            value = dict(flatten(value)[0])[self.path]
        return value if isinstance(value, torch.Tensor) else number_to_tensor(value)


class Watcher(Protocol):
    """What a segment calls before and after each of its steps."""

    def before(self, step: Step, environment: Environment) -> Any:
        """Take notice of a step that is about to run.

        Args:
            step: the step.
            environment: the values of all steps so far, by index.

        Returns:
            Anything; ``after()`` gets it.
        """

    def after(self, step: Step, environment: Environment, token: Any) -> None:
        """Take notice of a step that has run or raised.

        Args:
            step: the step.
            environment: the values of all steps so far, those that no later step reads included.
            token: what ``before()`` returned for this step.
        """


# Where nn.Module keeps what belongs to it.
_TABLES = ("_parameters", "_buffers", "_modules")


class Segment(nn.Module):
    """A part of a traced model as an ordinary module.

    It shares the model's submodules, parameters and buffers, under the model's own names. Each call has an environment
    of its own, so a segment may run in several threads at once.

    Args:
        steps: all steps of the traced model.
        calls: by step, the compiled call; see ``Step.compiled()``.
        included: the indices of the steps that this segment runs.
        feeds: what becomes of each tensor that it is given.
        picks: what it returns, as a tuple; None for the model's own output.
        model: the traced model.

    Attributes:
        watcher: when set on the class, every segment in this process calls it for each step, from any thread.
    """

    watcher: ClassVar[Watcher | None] = None

    def __init__(
        self,
        steps: Sequence[Step],
        calls: Sequence[Callable[[Environment], Any]],
        included: Iterable[int],
        feeds: Sequence[Feed],
        picks: Sequence[Pick] | None,
        model: nn.Module,
    ) -> None:
        super().__init__()
        self.training = False
        self._size = len(steps)
        self._feeds = tuple(feeds)
        self._picks = None if picks is None else tuple(picks)
        self._included = [steps[i] for i in sorted(included)]
        # Some tensors are only leaves of a step's value. Later steps read that value, so it is rebuilt from them, with
        # None for the leaves that are not given and that no step reads.
        packed = {feed.step for feed in feeds if feed.path}
        self._structures = {step: steps[step].structure for step in packed}
        self._packs = tuple((i, dict.fromkeys(shape.paths())) for i, shape in self._structures.items())
        _register(self, model, self._included)
        # Every value is dropped after the last step that reads it, so that memory is freed as in the eager model.
        last: dict[int, int] = {}
        for step in self._included:
            for used in step.reads:
                last[used] = step.index
        for pick in self._picks or ():
            last.pop(pick.step, None)
        dead: dict[int, tuple[int, ...]] = {}
        for used, i in last.items():
            dead[i] = (*dead.get(i, ()), used)
        self._program = tuple(
            (_read_attribute(self, s.target) if s.kind == "attr" else calls[s.index], s.index, dead.get(s.index, ()))
            for s in self._included
        )

    @property
    def steps(self) -> tuple[int, ...]:
        """The indices of the steps that this segment runs."""
        return tuple(step.index for step in self._included)

    def __deepcopy__(self, memo: dict[int, Any]) -> Segment:
        copied = Segment.__new__(Segment)
        memo[id(self)] = copied
        nn.Module.__init__(copied)
        # Only what nn.Module keeps is copied. The steps are shared, save for those that call modules, and the compiled
        # calls of these and of attributes are made again for the copies.
        own = {key: copy.deepcopy(self.__dict__[key], memo) for key in _TABLES}
        copied.__dict__.update(self.__dict__ | own)
        copied._included = [
            dataclasses.replace(step, target=memo[id(step.target)]) if step.is_module else step
            for step in self._included
        ]
        copied._program = tuple(
            (_read_attribute(copied, s.target) if s.kind == "attr" else s.compiled() if s.is_module else call, i, dead)
            for s, (call, i, dead) in zip(copied._included, self._program, strict=True)
        )
        return copied

    def apart(self, fixed: Mapping[int, torch.Tensor]) -> Segment:
        """Return a copy for tools that change modules while they follow them, as ``torch.export`` does.

        Its modules are its own, under names without dots, and hold this segment's parameters and buffers. It takes
        tensors as they lie in memory, since the graphs that such tools make know no strides.

        Args:
            fixed: the tensors of some feeds, by their place; whatever is given there, the copy uses these.
        """
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        copied = copy.deepcopy(self, dict(shared))
        copied._modules = {f"part{i}": module for i, module in enumerate(copied._modules.values())}
        copied._feeds = tuple(
            dataclasses.replace(feed, restore=_always(feed.restore, fixed[i]))
            if i in fixed
            else dataclasses.replace(feed, restore=None if isinstance(feed.restore, Layout) else feed.restore)
            for i, feed in enumerate(self._feeds)
        )
        return copied

    def load(self, tensors: Sequence[torch.Tensor]) -> Environment:
        """Return a new environment that holds the given tensors.

        Args:
            tensors: one tensor a feed, in the feeds' order.

        Raises:
            TypeError: there are more or fewer.
        """
        if len(tensors) != len(self._feeds):
            raise TypeError(f"this part of the model takes {len(self._feeds)} tensors; got {len(tensors)}")
        environment: Environment = [None] * self._size
        leaves: dict[int, dict[LeafPath, Any]] = {}
        for feed, tensor in zip(self._feeds, tensors, strict=True):
            value = clone(tensor) if feed.clone else tensor
            if feed.restore is not None:
                value = feed.restore(value)
            if feed.path:
                leaves.setdefault(feed.step, {})[feed.path] = value
            else:
                environment[feed.step] = value
        for step, blank in self._packs:
            environment[step] = self._structures[step].rebuild(blank | leaves[step])
        return environment

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Return the picked tensors as a tuple, or the model's own output where nothing is picked.

        Args:
            *tensors: one tensor a feed, in the feeds' order.

        Raises:
            TypeError: there are more or fewer.
        """
        if Segment.watcher is not None:
            environment = self.watched(tensors, Segment.watcher)
        else:
            environment = self.load(tensors)
            for call, i, dead in self._program:
                environment[i] = call(environment)
                for j in dead:
                    environment[j] = None
        return self.result(environment)

    def until(self, stopped: Callable[[], bool], tensors: Sequence[torch.Tensor]) -> Any:
        """Run like ``forward()``, but stop early when asked to.

        Args:
            stopped: is called before each step; the run ends when it returns True.
            tensors: one tensor a feed, in the feeds' order.

        Returns:
            What ``forward()`` returns; None when the run was stopped.
        """
        if Segment.watcher is not None:
            return None if stopped() else self.forward(*tensors)
        environment = self.load(tensors)
        for call, i, dead in self._program:
            if stopped():
                return None
            environment[i] = call(environment)
            for j in dead:
                environment[j] = None
        return self.result(environment)

    def begin(self, last: int, stopped: Callable[[], bool], tensors: Sequence[torch.Tensor]) -> Environment | None:
        """Run the steps up to one of them, and return the environment as it is then.

        Args:
            last: the index of the last step to run.
            stopped: is called before each step; the run ends when it returns True.
            tensors: one tensor a feed, in the feeds' order.

        Returns:
            The environment; None when the run was stopped.
        """
        environment = self.load(tensors)
        for call, i, dead in self._program:
            if i > last:
                break
            if stopped():
                return None
            environment[i] = call(environment)
            for j in dead:
                environment[j] = None
        return environment

    def holds(self, steps: Iterable[int], last: int) -> bool:
        """Return whether ``begin(last, …)`` returns an environment that holds the values of all these steps."""
        gone = {j for _, i, dead in self._program if i <= last for j in dead}
        there = {feed.step for feed in self._feeds} | {i for _, i, _ in self._program if i <= last}
        return there - gone >= set(steps)

    def result(self, environment: Environment) -> Any:
        """Return what ``forward()`` returns, from the environment at the end of a run."""
        if self._picks is None:
            return environment[-1]
        return tuple(pick(environment) for pick in self._picks)

    def timed(self, tensors: Sequence[torch.Tensor], clock: Callable[[], int]) -> list[int]:
        """Run like ``forward()``, and read a clock before the first step and after each.

        Args:
            tensors: one tensor a feed, in the feeds' order.
            clock: returns the time.

        Returns:
            The times, one more than there are ``steps``.
        """
        if Segment.watcher is not None:
            clocked = _Clocked(Segment.watcher, clock)
            self.watched(tensors, clocked)
            return clocked.stamps
        environment = self.load(tensors)
        stamps = [clock()]
        mark = stamps.append
        for call, i, dead in self._program:
            environment[i] = call(environment)
            for j in dead:
                environment[j] = None
            mark(clock())
        return stamps

    def watched(self, tensors: Sequence[torch.Tensor], watcher: Watcher) -> Environment:
        """Run like ``forward()``, and call a watcher before and after each step.

        Args:
            tensors: one tensor a feed, in the feeds' order.
            watcher: what is called.

        Returns:
            The environment at the end, in which only the values of picked steps and of the output are left.
        """
        environment = self.load(tensors)
        for step, (call, i, dead) in zip(self._included, self._program, strict=True):
            token = watcher.before(step, environment)
            try:
                environment[i] = call(environment)
            finally:
                watcher.after(step, environment, token)
            for j in dead:
                environment[j] = None
        return environment


class _Clocked:
    """Reads a clock after each step, and calls another watcher too."""

    def __init__(self, inner: Watcher, clock: Callable[[], int]) -> None:
        self._inner, self._clock = inner, clock
        self.stamps: list[int] = []

    def before(self, step: Step, environment: Environment) -> Any:
        if not self.stamps:
            self.stamps.append(self._clock())
        return self._inner.before(step, environment)

    def after(self, step: Step, environment: Environment, token: Any) -> None:
        self._inner.after(step, environment, token)
        self.stamps.append(self._clock())


def _read_attribute(segment: nn.Module, target: str | Constant) -> Callable[[Environment], Any]:
    """Return a function that reads an attribute of the model, at every call: a parameter may have been replaced."""
    if isinstance(target, Constant):
        return lambda _: target.tensor
    owner, name = _owner(segment, target)
    return lambda _: getattr(owner, name)


def _always(restore: Callable[[torch.Tensor], Any] | None, tensor: torch.Tensor) -> Callable[[Any], Any]:
    value = tensor if restore is None else restore(tensor)
    return lambda _: value


def _owner(segment: nn.Module, target: str) -> tuple[Any, str]:
    path, _, name = target.rpartition(".")
    return (segment._modules[path] if path else segment), name


def _register(segment: nn.Module, model: nn.Module, steps: Sequence[Step]) -> None:
    """Give ``segment`` the submodules and attributes that its steps use, under the names they have in the model.

    Each submodule is registered in the segment itself, with its whole dotted path as the name. Making the modules in
    between, which would only hold others, would cost more than all the rest of a cut.
    """
    modules = segment._modules
    for step in steps:
        if step.is_module:
            modules[step.module_path] = step.target
    for step in steps:
        if step.kind == "attr" and isinstance(step.target, str):
            source, name = functools.reduce(getattr, step.target.split(".")[:-1], model), step.target.rpartition(".")[2]
            path = step.target[: -len(name) - 1]
            if path and path not in modules:
                modules[path] = nn.Module().eval()
            owner = modules[path] if path else segment
            if owner is source:
                continue
            assert owner is not None
            if name in source._parameters:
                owner._parameters[name] = source._parameters[name]
            elif name in source._buffers:
                owner.register_buffer(
                    name, source._buffers[name], persistent=name not in source._non_persistent_buffers_set
                )
            else:
                setattr(owner, name, getattr(source, name))
