"""Whether a trace gives the model's own answer: both are run, and their bits are compared.

Following a model rests on what the model's source does while it is followed. What it does in a real call is only known
from a real call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon.errors import TraceError, short
from torchsurgeon.tracing.admission import refuse_changed_arguments
from torchsurgeon.tracing.call import Call, check_result
from torchsurgeon.tracing.crossing import EXTENSION_DATATYPES
from torchsurgeon.tracing.float_tests import left_out
from torchsurgeon.tracing.results import Left
from torchsurgeon.tracing.state import State, left_as_it_was
from torchsurgeon.tracing.step import Environment, Step, clone
from torchsurgeon.tracing.structure import flatten
from torchsurgeon.tracing.unfollowed import keeps_state

# A model that seeds PyTorch's generator itself must differ here from steps that do not.
_NOBODYS_SEED = 7_405_926_133
_PLAIN = (int, float, bool, complex, str)
_INTEGERS = {1: torch.uint8, 4: torch.int32}
EXAMPLE, OTHER_VALUES, ONE_MORE_SAMPLE = "the example", "other values", "one more sample"
OTHER_LAYOUT, OTHER_MASK = "another layout", "another mask"


class Mismatch(Exception):
    """A trace gives another answer than the model.

    Attributes:
        sample: for which input: ``EXAMPLE``, ``OTHER_VALUES`` or ``ONE_MORE_SAMPLE``.
        layer: the first layer whose result differs.
        module_path: the module that calls it.
    """

    def __init__(self, sample: str, layer: str, module_path: str) -> None:
        super().__init__(
            f"on {sample} the traced steps give another answer than the model; the first layer that differs is "
            f"{layer!r}"
        )
        self.sample, self.layer, self.module_path = sample, layer, module_path


class LeavesOut(Mismatch):
    """A trace was made of the model as it is where it is compiled, and leaves out a test of fractions."""

    def __init__(self, module_path: str, name: str) -> None:
        Exception.__init__(
            self, f"where it is compiled, the model leaves out a test of the values of a tensor, by {name!r}"
        )
        self.sample, self.layer, self.module_path = EXAMPLE, "", module_path


class Unrepeatable(Exception):
    """The model's own answers differ from run to run, so that there is nothing to compare with."""


def verify(
    model: nn.Module,
    call: Call,
    steps: Sequence[Step],
    tensors: Sequence[torch.Tensor],
    batch_free: bool,
    layouts: bool = False,
    masks: bool = False,
    whole: Collection[str] = (),
    check_values: Callable[[Sequence[torch.Tensor]], None] | None = None,
    noted: Callable[[Left], None] = lambda left: None,
) -> tuple[str, ...]:
    """Run a model and the steps that were traced from it, and compare their answers bit for bit.

    Args:
        model: the model, which is left as it was.
        call: how it is called.
        steps: its steps, settled.
        tensors: the example's tensors, in the order of ``call.names``.
        batch_free: whether the steps are said to hold for other batch sizes.
        layouts: whether to try tensors with their dimensions in another order in memory, too, because the way the
            model was traced does not notice whether it asks for that.
        masks: whether to try other masks, too, because the model was told that it is compiled, where it does not test
            their values.
        whole: the paths of the modules that are kept whole.
        check_values: raises ``TypeError`` for inputs that the steps are not for.
        noted: gets what a call with the example leaves in the model.

    Returns:
        For which inputs the answers are the same. Inputs that the model itself does not take are left out.

    Raises:
        Mismatch: the answers differ.
        Unrepeatable: the model's own answers to one input differ.
        TraceError: the model fails on the example, keeps state between calls, or changes its arguments' containers.
    """
    found = []
    state = State(model)
    for name, given in _samples(tensors, batch_free, layouts, masks):
        if check_values is not None and not _passes(check_values, given):
            continue
        try:
            expected, changed, again = _answers(model, call, given, state, after=None if name is EXAMPLE else tensors)
        except TraceError:
            raise
        except Exception as error:
            if name is not EXAMPLE:
                continue
            raise TraceError(
                f"{type(model).__name__} itself fails on the example: {short(error)}; give an example that the model "
                "takes, or trace with verify=False where the model cannot be run here"
            ) from error
        if again is not None and not same_answer(expected, again):
            raise TraceError(keeps_state(model, changed))
        if name is EXAMPLE:
            noted(state.left)
            _refuse_counters(model, call, given, state, expected)
            if masks:
                _refuse_left_out(model, call, given, whole, state)
        elif changed:
            # What a larger batch leaves may be read by the next call of the example's size.
            fresh, _, later = _answers(model, call, tensors, state, after=given)
            if later is not None and not same_answer(fresh, later):
                raise TraceError(keeps_state(model, changed))
        try:
            got = _seeded(lambda given=given: _run_steps(steps, given, model))  # type: ignore[misc]
        except Exception as error:
            raise Mismatch(name, *_first_failing(error, steps)) from error
        finally:
            state.restore()
        if not same_answer(expected, got):
            if not same_answer(expected, _answers(model, call, given, state)[0]):
                raise Unrepeatable
            raise Mismatch(name, *_first_difference(model, call, steps, given))
        found.append(name)
    return tuple(name for name in found if name not in (OTHER_LAYOUT, OTHER_MASK))


def _passes(check: Callable[[Sequence[torch.Tensor]], None], tensors: Sequence[torch.Tensor]) -> bool:
    try:
        check(tensors)
    except Exception:
        # The model does not take such inputs.
        return False
    return True


def _samples(
    tensors: Sequence[torch.Tensor], batch_free: bool, layouts: bool, masks: bool
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    # A tensor that the example has in two places is one tensor in the other samples, too.
    distinct = {id(t): t for t in tensors}

    def made(by_identity: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        return [by_identity[id(t)] for t in tensors]

    yield EXAMPLE, list(tensors)
    others = {key: _other_values(t) for key, t in distinct.items()}
    yield OTHER_VALUES, made(others)
    if batch_free:
        yield (
            ONE_MORE_SAMPLE,
            made({key: torch.cat([others[key][:1], t]) if t.dim() else t for key, t in distinct.items()}),
        )
    flags = {key: t for key, t in distinct.items() if masks and _is_mask(t)}
    if flags:
        yield OTHER_MASK, made({**distinct, **{key: torch.ones_like(t) for key, t in flags.items()}})
        yield OTHER_MASK, made({**distinct, **{key: _without_last(t) for key, t in flags.items()}})
    turned = {key: t for key, t in distinct.items() if t.dim() > 1 and t.layout is torch.strided}
    if layouts and turned:
        yield OTHER_LAYOUT, made({**distinct, **{key: t.mT.contiguous().mT for key, t in turned.items()}})


def _is_mask(tensor: torch.Tensor) -> bool:
    whole = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex and not tensor.is_quantized
    return whole and tensor.dim() > 0 and tensor.numel() > 0 and bool(((tensor == 0) | (tensor == 1)).all())


def _without_last(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask that is zero at the last place and one elsewhere."""
    made = torch.ones_like(mask)
    made[..., -1] = 0
    return made


def _other_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with other elements that a model is likely to take: the same ones in another order, and noise."""
    if tensor.is_quantized or tensor.layout is not torch.strided or tensor.is_nested:
        return tensor
    if tensor.dtype in EXTENSION_DATATYPES and tensor.element_size() in _INTEGERS:
        # PyTorch cannot move the elements of these dtypes about.
        return _other_values(tensor.resolve_conj().view(_INTEGERS[tensor.element_size()])).view(tensor.dtype)
    tensor = tensor.detach()
    mixed = tensor.flip(tuple(range(tensor.dim()))) if tensor.dim() else tensor.clone()
    if (
        not tensor.dtype.is_floating_point
        or tensor.dtype.itemsize == 1
        or not tensor.numel()
        or not bool(mixed.isfinite().all())
    ):
        return mixed
    noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.device)
    least = float(mixed.min())
    scale = float((mixed.max() - mixed.min()).double()) or 1.0
    # Up to an eighth of their range beyond it, on either side.
    return (least + (mixed.double() - least) * 0.75 + noise.double() * scale * 0.5 - 0.125 * scale).to(tensor.dtype)


def _seeded(run: Callable[[], Any]) -> Any:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(_NOBODYS_SEED)
        return run()


def _answers(
    model: nn.Module,
    call: Call,
    tensors: Sequence[torch.Tensor],
    state: State,
    after: Sequence[torch.Tensor] | None = None,
) -> tuple[Any, list[str], Any]:
    """Return the model's answer, what it left in its modules, and its answer when it had been called before.

    The second is only asked for where a call leaves something.

    Args:
        model: the model, which is left as it was.
        call: how it is called.
        tensors: its input tensors.
        state: what the model holds now.
        after: the inputs of the call before the second; None for the same ones.
    """

    def run(given: Sequence[torch.Tensor]) -> Any:
        return _run_model(model, call, given)

    try:
        answer = _kept(_seeded(lambda: run(tensors)))
        changed = state.changed()
        if not changed:
            return answer, changed, None
        if after is not None:
            state.restore()
            _seeded(lambda: run(after))
        return answer, changed, _seeded(lambda: run(tensors))
    finally:
        state.restore()


def _refuse_counters(
    model: nn.Module, call: Call, tensors: Sequence[torch.Tensor], state: State, expected: Any
) -> None:
    """Raise for a model that counts its calls, and answers otherwise after many of them."""
    if not state.left.changed:
        return
    try:
        _seeded(lambda: _run_model(model, call, tensors))
        counters = state.count_on()
        later = _seeded(lambda: _run_model(model, call, tensors)) if counters else expected
    except Exception:
        # Such a number may be a size that fits nothing else.
        return
    finally:
        state.restore()
    if not same_answer(expected, later):
        raise TraceError(keeps_state(model, counters))


def _refuse_left_out(
    model: nn.Module, call: Call, tensors: Sequence[torch.Tensor], whole: Collection[str], state: State
) -> None:
    """Raise ``LeavesOut`` where the model leaves out a test of fractions where it is compiled."""

    def run(given: Sequence[torch.Tensor]) -> None:
        state.restore()
        args, kwargs = call.rebuild(dict(zip(call.paths, given, strict=True)))
        model(*args, **kwargs)

    try:
        found = _seeded(lambda: left_out(run, model, tensors, whole))
    finally:
        state.restore()
    if found is not None:
        raise LeavesOut(*found)


def _run_model(model: nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    """Return the model's answer; raise for one that cannot be put together again, and for changed arguments."""
    copies = {id(tensor): clone(tensor) for tensor in tensors}
    passed = [copies[id(tensor)] for tensor in tensors]
    args, kwargs = call.rebuild(dict(zip(call.paths, passed, strict=True)))
    result = model(*args, **kwargs)
    check_result(model, result)
    refuse_changed_arguments(model, call, args, kwargs, passed)
    return result


def _kept(answer: Any) -> Any:
    """Return an answer whose tensors the next run does not overwrite."""
    leaves, structure = flatten(answer)
    return structure.rebuild(
        {
            path: clone(leaf) if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided else leaf
            for path, leaf in leaves
        }
    )


def _run_steps(
    steps: Sequence[Step],
    tensors: Sequence[torch.Tensor],
    model: nn.Module,
    seen: Callable[[Step, Any], None] | None = None,
) -> Any:
    environment: Environment = [None] * len(steps)
    given = iter(tensors)
    for step in steps:
        if step.kind == "input":
            environment[step.index] = clone(next(given))
        elif step.kind == "attr":
            environment[step.index] = step.attribute_of(model)
        else:
            try:
                environment[step.index] = step.compiled()(environment)
            except Exception as error:
                error.__dict__["failed_step"] = step
                raise
        if seen is not None:
            seen(step, environment[step.index])
    return environment[-1]


def same_answer(one: Any, other: Any) -> bool:
    """Return whether two answers of a model are equal: their structure, and the bits of their tensors."""
    (leaves, structure), (others, structure_of_other) = flatten(one), flatten(other)
    return structure == structure_of_other and all(
        path == path_of_other and _same_leaf(a, b) for (path, a), (path_of_other, b) in zip(leaves, others, strict=True)
    )


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return same_bits(one, other)
    if {type(one), type(other)} & {torch.Tensor, *_PLAIN}:
        return type(one) is type(other) and bool(one == other or (one != one and other != other))
    try:
        return (
            one is other
            or type(one) is not type(other)
            or bool(one == other)
            or one != one
            or "__eq__" not in {name for kind in type(one).__mro__[:-1] for name in vars(kind)}
        )
    except Exception:
        return False


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same type, shape and elements; a NaN equals a NaN."""
    if (one.dtype, one.shape, one.layout, one.device) != (other.dtype, other.shape, other.layout, other.device):
        return False
    if one.layout is not torch.strided or one.is_nested:
        return one.is_nested or torch.equal(one.to_dense(), other.to_dense())
    if one.is_quantized:
        return torch.equal(one, other)
    one, other = one.detach().resolve_conj().resolve_neg(), other.detach().resolve_conj().resolve_neg()
    if not one.dtype.is_floating_point and not one.dtype.is_complex:
        return torch.equal(one, other)
    # As bytes, for dtypes that PyTorch cannot compare; NaNs may differ in bits that nobody sees.
    if torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)):
        return True
    return one.dtype.itemsize > 1 and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _first_failing(error: Exception, steps: Sequence[Step]) -> tuple[str, str]:
    step: Step = error.__dict__.get("failed_step", steps[-1])
    return step.name, step.module_path


class _Results:
    """A hook that keeps what modules give, by their paths.

    A function would keep it in its closure, which is taken for a memory of the model's, and emptied after each call.
    """

    def __init__(self, paths: Mapping[int, str]) -> None:
        self._paths = paths
        self.by_path: dict[str, list[Any]] = {}

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        self.by_path.setdefault(self._paths[id(module)], []).append(_kept(result))


def _first_difference(
    model: nn.Module, call: Call, steps: Sequence[Step], tensors: Sequence[torch.Tensor]
) -> tuple[str, str]:
    """Return the first layer whose result differs from the model's, as far as modules show it, and its module."""
    wanted = {step.module_path for step in steps if step.kind == "call"}
    paths = {id(module): path for path, module in model.named_modules() if path and path in wanted}
    results = _Results(paths)
    order: list[tuple[Step, Any]] = []
    # Before the model's own hooks, which are steps of their own.
    hooks = [module.register_forward_hook(results, prepend=True) for module in model.modules() if id(module) in paths]
    try:
        _answers(model, call, tensors, State(model))
    finally:
        for one in hooks:
            one.remove()
    with left_as_it_was(model):
        _seeded(
            lambda: _run_steps(
                steps,
                tensors,
                model,
                lambda step, value: order.append((step, _kept(value) if step.kind == "call" else None)),
            )
        )
    suspect: Step | None = None
    for step, value in order:
        if step.kind != "call":
            continue
        real = results.by_path.get(step.module_path, [])
        if not step.is_module:
            # A function that gives what its module gives is right, and so is what led to it.
            suspect = None if any(same_answer(value, one) for one in real) else suspect or step
            continue
        if real and not same_answer(value, real.pop(0)):
            found = suspect or step
            return found.name, found.module_path
        suspect = None
    found = suspect or steps[-1]
    return found.name, found.module_path
