"""List a model's partition points, measure its layers, plan a cut, and cut the model by hand. No server is needed.

python cut_and_profile.py --spec torchvision:resnet18 --slow 10
"""

from __future__ import annotations

import argparse

import torch

import torchsurgeon as ts
from torchsurgeon.models import specs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", default="torchvision:alexnet", help="the model, as torchsurgeon trace takes it")
    parser.add_argument("--slow", type=float, default=10, help="how many times slower the device is than this machine")
    options = parser.parse_args()

    loaded = specs.load(options.spec)
    model, example = loaded.model, loaded.args
    graph = ts.trace(model, *example)
    print(f"{type(model).__name__}: {len(graph.layers)} layers, {len(graph.points)} partition points")
    least = min(graph.points[1:-1], key=lambda point: point.size_bytes)
    for index, point in enumerate(graph.points[:-1]):  # nothing crosses after the last layer
        if all(point.size_bytes < earlier.size_bytes for earlier in graph.points[:index]):
            print(f"  {point.size_bytes:>9} bytes cross, fewer than anywhere before: {point.where}")

    server = ts.profile(graph, repeats=5)
    device = server.scaled(options.slow)
    slowest = sorted(zip(server.layer_s, server.layers, strict=True), reverse=True)[:5]
    print(f"{server.total_s * 1e3:.1f} ms on this machine; the slowest layers:")
    for latency_s, name in slowest:
        print(f"  {latency_s * 1e3:7.2f} ms  {name}")

    for name in ("3g", "lte", "wifi"):
        plan = ts.plan(graph, device=device, server=server, link=name)
        print(f"{name:>5}: {plan.point.where}, {plan.terms.latency_s * 1e3:.0f} ms predicted")

    part = ts.cut(graph, least)
    with torch.no_grad():
        boundary = part.head(*example)
        assert torch.equal(part.tail(*boundary), model(*example))
    crossed = ", ".join(
        f"{spec.name} {list(tensor.shape)}" for spec, tensor in zip(part.point.tensors, boundary, strict=True)
    )
    print(f"{part.point.where}: {crossed} crossed, and the answer is the model's own, bit for bit")


if __name__ == "__main__":
    main()
