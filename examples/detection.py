"""Detect objects with a cut inside the backbone: a list of images goes in, and a list of boxes comes out.

python detection.py                                              # starts a server in this process
torchsurgeon serve ssd=torchvision:ssdlite320_mobilenet_v3_large # or start one yourself
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
    parser.add_argument("--server", help="a server's URL; without it, one is started in this process")
    parser.add_argument("--cut", default="backbone.features.0.10.add", help="the last layer that runs on this device")
    options = parser.parse_args()
    loaded = specs.load(SPEC)  # random weights from a seed, the same as the server's
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
        print(f"image {image}: {len(got['boxes'])} boxes, equal to the unsplit model's bit for bit")
    print("crossed:", *(str(spec) for spec in split.partition.tensors), sep="\n  ")
    print(split.last)


if __name__ == "__main__":
    main()
