"""Split a photo classifier whose input is a photo's bytes: the head runs in this process, the tail on a server.

python split_photo.py                                    # starts a server in this process
torchsurgeon serve photo=split_photo:classifier          # or start one yourself, in this folder
python split_photo.py --server http://127.0.0.1:8000     # and use it
"""

from __future__ import annotations

import argparse
import contextlib

import torch
from torch import Tensor, nn

import torchsurgeon as ts


class Classifier(nn.Module):
    """A classifier that scales and normalizes the photo itself.

    So where all of the model runs on the server, the photo crosses the uplink as bytes, a quarter of their floats.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, photo: Tensor) -> Tensor:
        return self.net((photo.float() / 255 - self.mean) / self.deviation)


def classifier() -> tuple[nn.Module, Tensor]:
    """Return the model and an example of its input. The server's SPEC names this function."""
    from torchvision.models import squeezenet1_1

    return Classifier(squeezenet1_1()), torch.zeros(1, 3, 224, 224, dtype=torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", help="a server's URL; without it, one is started in this process")
    given = parser.parse_args().server
    with contextlib.ExitStack() as stack:
        torch.manual_seed(0)  # random weights, the same as the server's; with your own, load them on both sides
        model, photo = classifier()
        model.eval()
        if given is None:
            from torchsurgeon import serve

            registry = serve.ModelRegistry()
            registry.add("photo", model, (photo,))
            given = stack.enter_context(serve.Server(serve.create_app(registry))).url
        split = stack.enter_context(ts.SplitModule(model, photo, server=given, name="photo"))
        photo = torch.randint(0, 256, photo.shape, dtype=torch.uint8)
        scores = split(photo)
        print(f"class {int(scores.argmax())}; {split.last}")
        for where in ("device", "net.features.5", "server"):
            split.partition = where
            with torch.no_grad():
                assert torch.equal(split(photo), model(photo))
            print(split.last)


if __name__ == "__main__":
    main()
