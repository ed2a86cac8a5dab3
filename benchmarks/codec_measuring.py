"""How long a table of codecs takes: EfficientNet-Lite0, 120 photographs, ten codecs, a budget of 3 %.

The rival is the plain way: for each photograph, cut, codec and call, one head, one codec, one tail. It runs on every
tenth photograph, since its time is in proportion to their number; the result is seconds for all of them.

    python -m benchmarks.codec_measuring   # results/codec-measuring.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import torchsurgeon as ts
from benchmarks.support import pictures, result_file
from torchsurgeon.codec import Budget, find_codec, measure, promising
from torchsurgeon.cutting.partition import cut
from torchsurgeon.tracing.graph import LayerGraph

OUT = result_file.RESULTS / "codec-measuring.json"
CODECS = ("raw", "zstd", "float16", "int8", "int8+zstd", "int4", "int4+zstd", "jpeg-95", "webp-95", "avif-90")
_EACH = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = pictures.photographs(held_out_views=1).held_out[: options.photographs]
    graph = ts.trace(pictures.classifier("lite0"), found[:1])
    begin_s, begun_cpu_s = time.perf_counter(), time.process_time()
    table = measure(graph, list(found.split(1)), CODECS, budget=Budget(max_top1_change=0.03))
    wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begun_cpu_s
    plain_cpu_s = _plain(graph, found[::_EACH]) * len(found) / len(found[::_EACH])
    result_file.write(
        options.out,
        {
            "photographs": len(found),
            "codecs": len(CODECS),
            "threads": options.threads,
            "rows": len(table.rows),
            "wall_s": round(wall_s, 1),
            "cpu_s": round(cpu_s, 1),
            "plain_cpu_s": round(plain_cpu_s, 1),
            "plain_over_ours": round(plain_cpu_s / cpu_s, 1),
        },
        **pictures.packages(),
    )
    print(f"{wall_s:.0f} s ({cpu_s:.0f} s of processor time); the plain way {plain_cpu_s:.0f} s of processor time")


@torch.no_grad()
def _plain(graph: LayerGraph, found: Tensor) -> float:
    begin_s = time.process_time()
    for point in promising(graph):
        part = cut(graph, point)
        for picture in found.split(1):
            graph.model(picture).argmax(1)
            for name in CODECS:
                codec = find_codec(name)
                tensors = part.head(picture)
                if not any(codec.suits(one.dtype, one.shape) for one in tensors):
                    continue
                encoded = [codec.encode(one) for one in tensors]
                decoded = [
                    find_codec(e.codec).decode(e.data, one.dtype, one.shape, e.order, max_bytes=one.nbytes)
                    for e, one in zip(encoded, tensors, strict=True)
                ]
                part.tail(*decoded).argmax(1)
    return time.process_time() - begin_s


if __name__ == "__main__":
    main()
