"""Prints the fingerprint and the weights' digest of a model of every kind: ``python kin_digests.py``."""

from __future__ import annotations

import json

from kin import EXAMPLE, KINDS, Whole, made

from torchsurgeon.models.weights import weight_digests
from torchsurgeon.tracing.tracer import trace

if __name__ == "__main__":
    for kind in KINDS:
        model = made(kind, 1)
        print(
            json.dumps([kind, trace(model, EXAMPLE, leaf_modules=[Whole]).fingerprint, weight_digests(model).combined])
        )
