"""What PyTorch's functions, methods and attributes are to a recorder: a layer, a size, a value, or something static."""

from __future__ import annotations

import builtins
import enum
import functools
import operator
from typing import Any, NamedTuple

import torch


class Kind(enum.Enum):
    """What a call gives, and so how it is followed."""

    CALL = "a step: tensors computed from tensors"
    STATIC = "the same for all values and sizes, such as a dtype or a rank"
    SIZE = "a number that sizes and strides decide"
    VALUE = "something that the elements of a tensor decide"
    REFUSED = "something that leaves no trace"
    UNTOLD = "something that says how a tensor lies in its caller's memory, and that is not sent"


class Operation(NamedTuple):
    """A call, as it is recorded.

    Attributes:
        kind: what it gives.
        target: what the step calls: a function, or the name of a method of the first argument.
        args: its positional arguments.
        name: the plain name of the function, method or attribute.
        reason: why it is refused.
    """

    kind: Kind
    target: Any
    args: tuple[Any, ...]
    name: str
    reason: str = ""


_STATIC = frozenset(
    """
    dtype device ndim layout requires_grad is_leaf grad_fn names itemsize is_cuda is_cpu is_meta is_xla is_mps is_xpu
    is_hpu is_ipu is_maia is_mtia is_vulkan is_sparse is_sparse_csr is_quantized is_nested is_mkldnn retains_grad
    output_nr dim ndimension is_floating_point is_complex is_signed is_inference is_conj is_neg element_size
    get_device has_names is_pinned result_type can_cast __repr__ __str__ is_distributed qscheme
    _backward_hooks _has_symbolic_sizes_strides
    """.split()  # noqa: SIM905
)
# These say where a tensor is, which for a tensor on the meta device is where the model is.
OF_DEVICE = frozenset("device is_cuda is_cpu is_meta is_xpu is_mps is_xla is_hpu get_device type".split())  # noqa: SIM905
_SIZE = frozenset("shape nbytes size numel nelement stride is_contiguous __len__ is_same_size".split())  # noqa: SIM905
_VALUE = frozenset(
    """
    item tolist numpy __array__ __bool__ __int__ __float__ __index__ __complex__ __contains__ __format__ is_nonzero
    equal allclose __dlpack__ data_ptr storage untyped_storage _typed_storage is_set_to __array_interface__
    __cuda_array_interface__ is_coalesced q_scale q_zero_point
    """.split()  # noqa: SIM905
)
_GRADIENTS = frozenset(
    "backward requires_grad_ register_hook register_post_accumulate_grad_hook retain_grad grad".split()  # noqa: SIM905
)
_UNSEEN = frozenset(
    """
    apply_ map_ map2_ set_ share_memory_ __setstate__ __reduce_ex__ __deepcopy__ as_subclass module_load resize_as_
    resize_ swap_tensors as_strided_
    """.split()  # noqa: SIM905
)
_UNTOLD = frozenset("_version storage_offset _is_view is_shared _base".split())  # noqa: SIM905
# Operators arrive as methods. They are recorded as Python's operators, as the model's source has them.
_OPERATORS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "remainder": operator.mod,
    "__floordiv__": operator.floordiv,
    "matmul": operator.matmul,
    "neg": operator.neg,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "__invert__": operator.invert,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "__eq__": operator.eq,
    "__ne__": operator.ne,
    "eq": operator.eq,
    "ne": operator.ne,
    "add_": operator.iadd,
    "sub_": operator.isub,
    "mul_": operator.imul,
    "div_": operator.itruediv,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__lshift__": operator.lshift,
    "__rshift__": operator.rshift,
}
_SWAPPED = {
    "__rsub__": operator.sub,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rpow__": operator.pow,
    "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod,
    "__rmatmul__": operator.matmul,
    "__rlshift__": operator.lshift,
    "__rrshift__": operator.rshift,
}
_COUNT = {"neg": 1, "__invert__": 1, "__setitem__": 3}


@functools.cache
def _methods() -> dict[Any, str]:
    found = {}
    for name in dir(torch.Tensor):
        try:
            member = getattr(torch.Tensor, name)
            found[member] = name
        except (AttributeError, TypeError, RuntimeError):
            continue
    return found


def describe(func: Any, args: tuple[Any, ...], kwargs: Any = None) -> Operation:
    """Return what a call is to a recorder.

    Args:
        func: what PyTorch says is called.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(func.__self__, "__name__", "") or getattr(
            getattr(func.__self__, "fget", None), "__name__", ""
        )
        if name != "__get__":
            reason = f"the attribute {attribute!r} of a tensor is assigned"
            return Operation(Kind.REFUSED, None, args, attribute, reason)
        return _attribute(attribute, args)
    method = _methods().get(func) if _hashable(func) else None
    plain = method or name
    if plain in _GRADIENTS and (method or getattr(func, "__module__", "") == "torch.autograd"):
        return Operation(Kind.REFUSED, None, args, plain, f"gradients are asked for, by {plain!r}; they end at a cut")
    if method is not None and plain in _UNSEEN:
        return Operation(Kind.REFUSED, None, args, plain, f"{plain!r} of a tensor leaves no trace")
    if method is not None and plain in _UNTOLD:
        return Operation(Kind.UNTOLD, None, args, plain)
    if plain in _STATIC or (plain == "type" and len(args) == 1 and not kwargs):
        return Operation(Kind.STATIC, None, args, plain)
    if plain in _SIZE:
        target = builtins.len if plain == "__len__" else plain if method is not None else func
        return Operation(Kind.SIZE, target, args, plain)
    if plain in _VALUE and (method is not None or func in (torch.equal, torch.allclose, torch.is_nonzero)):
        return Operation(Kind.VALUE, None, args, plain)
    if method is None:
        return Operation(Kind.CALL, func, args, plain)
    if not kwargs and plain in _SWAPPED and len(args) == 2:
        return Operation(Kind.CALL, _SWAPPED[plain], args[::-1], plain)
    if not kwargs and plain in _OPERATORS and len(args) == _COUNT.get(plain, 2):
        return Operation(Kind.CALL, _OPERATORS[plain], args, plain)
    return Operation(Kind.CALL, method, args, plain)


def _attribute(name: str, args: tuple[Any, ...]) -> Operation:
    if name in _UNTOLD:
        return Operation(Kind.UNTOLD, None, args, name)
    if name in _STATIC:
        return Operation(Kind.STATIC, None, args, name)
    if name in _SIZE:
        return Operation(Kind.SIZE, builtins.getattr, (args[0], name), name)
    if name in _VALUE:
        return Operation(Kind.VALUE, None, args, name)
    if name in ("grad", "_grad"):
        return Operation(Kind.REFUSED, None, args, name, f"the attribute {name!r} of a tensor is read")
    return Operation(Kind.CALL, builtins.getattr, (args[0], name), name)


def _hashable(func: Any) -> bool:
    try:
        hash(func)
    except TypeError:
        return False
    return True
