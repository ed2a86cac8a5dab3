"""Load an exported program (``.pt2``) after checking that nothing in the file can run code.

``torch.export.load`` unpickles what a file marks as pickled, looks operator names up as attributes of ``torch``,
evaluates shape expressions and executes guards. So a file from elsewhere could run any code. Here every record is
checked first, with the reader that torch itself uses and on the same bytes that are then loaded. Only known records are
accepted, with weights that are not pickled, example inputs that load with ``weights_only``, operators from an allowed
set, and expressions of plain arithmetic.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchsurgeon.errors import SpecError, short

_RECORD = re.compile(
    r"models/model\.json|data/(weights/(weight_\d+|model_weights_config\.json)"
    r"|constants/(tensor_\d+|model_constants_config\.json)|sample_inputs/model\.pt)"
    r"|archive_(format|version)|byteorder|version|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
)
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|higher_order|torchvision|quantized_decomposed)(\.[A-Za-z0-9_]+){1,2}"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pos|pow|abs|index|and_|or_|not_|lt|le|eq|ne|ge|gt)"
    r"|math\.[a-z0-9]+|torch\.sym_[a-z_]+"
)
_FORBIDDEN_TARGET = re.compile(r"__|from_file|triton|load_library")
_PLAIN = re.compile(r"[\w.\-:/<>*]*")
# PyTorch keeps the values of these keys as text, quotes them or parses them as JSON, but never executes them.
_TEXT_KEYS = frozenset({"metadata", "as_string", "in_spec", "out_spec", "torch_version"})
_FUNCTIONS = frozenset(
    [
        "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor",
        "ceiling", "And", "Or", "Not", "Equality", "Unequality", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "LessThan",
        "StrictLessThan", "GreaterThan", "StrictGreaterThan", "Piecewise", "ExprCondPair", "FloorDiv",
        "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "IntTrueDiv",
        "FloatTrueDiv", "TruncToInt", "TruncToFloat", "RoundToInt", "ToFloat", "PowByNatural", "FloatPow",
        "LShift", "RShift", "Identity", "Sum",
    ]
)  # fmt: skip
_EXPRESSION_NODES = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.Tuple,
)


def load_exported(path: Path) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return an exported program as a module, and its example arguments.

    Raises:
        SpecError: the file may run code, is not a valid exported program, or holds no example inputs.
    """
    try:
        data = path.read_bytes()
        _check(data)
        program = torch.export.load(io.BytesIO(data))
        example = program.example_inputs
        module = program.module()
    except SpecError as error:
        raise SpecError(f"{short(path)} is refused: {error}") from None
    except Exception as error:
        raise SpecError(
            f"{short(path, 100)} is no exported program that PyTorch {torch.__version__} loads "
            f"({type(error).__name__}: {short(error, 200)}); export the model again with this version"
        ) from error
    if example is None:
        raise SpecError(f"{short(path)} holds no example inputs; save it with torch.export.save of a recent PyTorch")
    args, kwargs = example
    return module, tuple(args), dict(kwargs)


def _check(data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        paths = archive.namelist()
    names = [path.partition("/")[2] for path in paths]
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    if len(set(paths)) != len(paths) or not set(reader.get_all_records()) <= set(names):
        raise SpecError("each record must be listed once, and in the same way for every reader of the archive")
    for path, name in zip(paths, names, strict=True):
        if not _RECORD.fullmatch(name):
            raise SpecError(f"record {short(path)} does not belong into an exported program, and may hold code")
    for kind, key in (("weights", "weight"), ("constants", "tensor")):
        config = json.loads(reader.get_record(f"data/{kind}/model_{kind}_config.json"))["config"]
        for name, entry in config.items():
            if entry["use_pickle"] is not False or not re.fullmatch(rf"{key}_\d+", entry["path_name"]):
                raise SpecError(
                    f"{kind[:-1]} {short(name)} is stored as a pickle; export the model with dense tensors only"
                )
    sample = reader.get_record("data/sample_inputs/model.pt")
    if sample:
        try:
            torch.load(io.BytesIO(sample), weights_only=True)
        except Exception as error:
            raise SpecError(f"the example inputs must be tensors; they hold more ({type(error).__name__})") from None
    _walk(json.loads(reader.get_record("models/model.json")), "")


def _walk(value: Any, key: str) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if key != "metadata":
                _plain(name)
            _walk(item, "metadata" if key == "metadata" else name)
    elif isinstance(value, list):
        for item in value:
            _walk(item, key)
    elif isinstance(value, str):
        if key in ("target", "as_operator"):
            if not _TARGET.fullmatch(value) or _FORBIDDEN_TARGET.search(value):
                raise SpecError(f"it calls {short(value)}, which is not one of the allowed operators")
        elif key == "expr_str":
            _expression(value)
        elif key == "guards_code":
            _guard(value)
        elif key not in _TEXT_KEYS:
            _plain(value)


def _plain(text: str) -> None:
    if not _PLAIN.fullmatch(text):
        raise SpecError(f"a name must consist of letters, digits and _.-:/<>*, and {short(text)} may be code")


def _expression(text: str) -> None:
    """Check that a text is what sympy writes for a size: numbers, symbols, arithmetic and sympy's own functions."""
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            quoted = [arg for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            good = called in _FUNCTIONS and (not quoted or (called in ("Symbol", "Integer", "Float", "Rational")))
            good = good and all(re.fullmatch(r"[\w.+-]+", str(arg.value)) for arg in quoted)
            good = good and all(isinstance(keyword.value, ast.Constant) for keyword in node.keywords)
        elif isinstance(node, ast.keyword):
            good = not isinstance(getattr(node.value, "value", None), str) or _is_precision(node)
        else:
            good = isinstance(node, _EXPRESSION_NODES)
        if not good or (isinstance(node, ast.Name) and "__" in node.id):
            raise SpecError(f"a shape expression must be arithmetic; got {short(text)}")


def _is_precision(node: ast.keyword) -> bool:
    """Return whether a keyword is the quoted number that sympy writes beside a Float."""
    return node.arg == "precision" and isinstance(node.value, ast.Constant) and str(node.value.value).isdigit()


def _guard(text: str) -> None:
    """Check that a text compares sizes of the inputs, as in ``L['x'].size()[0] <= 64``."""
    allowed = (*_EXPRESSION_NODES, ast.Subscript, ast.Attribute, ast.Call)
    for node in ast.walk(_parsed(text)):
        good = isinstance(node, allowed)
        if isinstance(node, ast.Name):
            good = node.id in ("L", "torch", "math")
        elif isinstance(node, ast.Attribute):
            good = re.fullmatch(r"size|stride|storage_offset|sym_[a-z]+|ceil|floor|trunc", node.attr) is not None
        elif isinstance(node, ast.Call):
            good = isinstance(node.func, ast.Attribute)
        if not good:
            raise SpecError(f"a guard must compare sizes of the inputs; got {short(text)}")


def _parsed(text: str) -> ast.Expression:
    try:
        return ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SpecError(f"a shape must be given by an expression; got {short(text)}") from None
