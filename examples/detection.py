"""Detect objects with the cut inside the backbone: lists of images in, lists of boxes out, as torchvision gives them.

python detection.py                                              # with a server of its own
torchsurgeon serve ssd=torchvision:ssdlite320_mobilenet_v3_large # or start one
python detection.py --server http://127.0.0.1:8000               # and use it
"""

from __future__ import annotations

import argparse
import contextlib

import torch

import torchsurgeon as ts
from torchsurgeon.models import specs

SPEC = "torchvision:ssdlite320_mobilenet_v3_large"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", help="URL; one is started in this process otherwise")
    parser.add_argument("--cut", default="backbone.features.0.10.add", help="the last layer that runs here")
    options = parser.parse_args()
    loaded = specs.load(SPEC)  # seeded random weights, as the server has them
    model, images = loaded.model, loaded.args[0]
    with contextlib.ExitStack() as stack:
        if options.server is None:
            from torchsurgeon import serve

            registry = serve.ModelRegistry()
            registry.load("ssd", SPEC)
            options.server = stack.enter_context(serve.Server(serve.create_app(registry))).url
        split = stack.enter_context(
            ts.SplitModule(model, (images,), server=options.server, name="ssd", partition=options.cut)
        )
        found = split(images)
        with torch.no_grad():
            expected = model(images)
    for image, (got, want) in enumerate(zip(found, expected, strict=True)):
        assert all(torch.equal(got[field], want[field]) for field in want)
        print(f"image {image}: {len(got['boxes'])} boxes, the model's own bit for bit")
    print("crossed:", *(str(spec) for spec in split.partition.tensors), sep="\n  ")
    print(split.last)


if __name__ == "__main__":
    main()
