"""Describe calls of PyTorch that are several operations in one: attention with its projections, recurrent layers.

Each function takes the name, the output and the arguments of a call, with meta tensors, as calls.Describe says.
"""

from __future__ import annotations

from typing import Any

import torch

from torchsurgeon.prediction.kinds import Operation


def fused_attention(
    name: str,
    out: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    width: int,
    heads: int,
    *_: Any,
    **__: Any,
) -> list[Operation]:
    """Describe attention with its projections; query, key and value have shape (batch, positions, features)."""
    batch, targets, sources = query.shape[0], query.shape[1], key.shape[1]
    item = query.element_size()
    if query is key and key is value:
        projections = [(targets, query.shape[2], 3 * width)]
    else:
        projections = [(t.shape[1], t.shape[2], width) for t in (query, key, value)]
    return [
        *(Operation("linear", "linear", (batch * rows, inner, outer), item) for rows, inner, outer in projections),
        Operation("attention", "plain", (batch * heads, targets, sources, width // heads), item),
        Operation("linear", "linear", (batch * targets, width, width), item),
    ]


def attention_forward(
    name: str, out: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **_: Any
) -> list[Operation]:
    """Describe ``torch.nn.functional.multi_head_attention_forward``, which takes positions before the batch."""
    given = (query, key, value)
    # Where query, key and value are one tensor, their projections are one product, so it must stay one tensor.
    turned = {id(t): t.transpose(0, 1) if t.dim() == 3 else t.unsqueeze(0) for t in given}
    query, key, value = (turned[id(t)] for t in given)
    return fused_attention(name, out, query, key, value, *rest)


def fused_encoder(
    name: str, out: Any, x: torch.Tensor, width: int, heads: int, *rest: Any, **named: Any
) -> list[Operation]:
    """Describe the fast path of ``torch.nn.TransformerEncoderLayer``, which is one operator of ATen."""
    rows, item, hidden = x.shape[0] * x.shape[1], x.element_size(), rest[11].shape[0]
    return [
        *fused_attention(name, out, x, x, x, width, heads),
        Operation("normalization", "layer_norm", (rows, width), item),
        Operation("linear", "linear", (rows, width, hidden), item),
        Operation("activation", "gelu" if rest[5] else "relu", (rows * hidden,), item),
        Operation("linear", "linear", (rows, hidden, width), item),
        Operation("elementwise", "add", (rows * width, 2 * rows * width), item),
        Operation("elementwise", "add", (rows * width, 2 * rows * width), item),
        Operation("normalization", "layer_norm", (rows, width), item),
    ]


def normalize(
    name: str, out: torch.Tensor, input: torch.Tensor, p: float = 2.0, dim: int = 1, *_: Any, **named: Any
) -> list[Operation]:
    """Describe ``torch.nn.functional.normalize``: a norm along one dimension, and a division by it."""
    rows = input.numel() // max(input.shape[dim] if input.dim() else 1, 1)
    return [
        Operation("reduction", "norm", (rows, input.numel() // max(rows, 1)), input.element_size()),
        Operation("elementwise", "div broadcast", (input.numel(), input.numel() + rows), input.element_size()),
    ]


def recurrent(name: str, out: Any, input: torch.Tensor, *args: Any, **named: Any) -> list[Operation]:
    """Describe a recurrent network as one operation a layer, with a pass for each direction."""
    at = max(i for i, value in enumerate(args) if isinstance(value, (tuple, list)))
    weights, layers, both = args[at], args[at + 2], bool(args[at + 5])
    kind, gates = name.partition("_")[0], {"lstm": 4, "gru": 3}.get(name, 1)
    if isinstance(args[0], torch.Tensor) and not args[0].is_floating_point():  # packed, with the batch of every step
        steps = args[0].numel()
        batch = -(-input.shape[0] // steps)
    elif input.dim() == 2:
        steps, batch = input.shape[0], 1
    else:
        steps, batch = (input.shape[1], input.shape[0]) if args[at + 6] else (input.shape[0], input.shape[1])
    passes = 2 if both else 1
    into = weights[:: len(weights) // (layers * passes)][::passes]
    return [
        Operation(
            "recurrent", kind, (steps, batch, w.shape[1], w.shape[0] // gates, gates, passes), input.element_size()
        )
        for w in into
    ]
