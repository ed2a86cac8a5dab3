"""Classify the frames of a video: while one frame is on its way to the server, the head of the next one runs.

python video_stream.py                       # over an emulated LTE link, to a server in this process
python video_stream.py --link wifi --frames 60
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.models import squeezenet1_1

import torchsurgeon as ts
from torchsurgeon import serve
from torchsurgeon.emulate import LinkEmulator


def video(frames: int) -> Iterator[Tensor]:
    """Return random frames in place of a camera's. Each is made when it is asked for."""
    for number in range(frames):
        yield torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(number))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--link", default="lte", help="3g, lte, wifi, or UP/DOWN/RTT in Mbit/s and seconds")
    parser.add_argument("--frames", type=int, default=20, help="how many frames are classified")
    given = parser.parse_args()
    torch.manual_seed(0)
    model, link = squeezenet1_1().eval(), ts.Link.parse(given.link)
    registry = serve.ModelRegistry()
    registry.add("video", model, (torch.rand(1, 3, 224, 224),))
    with (
        serve.Server(serve.create_app(registry)) as server,
        LinkEmulator(0, "127.0.0.1", server.port, link) as emulator,
        torch.no_grad(),
        ts.SplitModule(
            model,
            torch.rand(1, 3, 224, 224),
            server=f"http://127.0.0.1:{emulator.port}",
            name="video",
            partition="features.5",
            codec="auto",
        ) as split,
    ):
        expected = [model(frame) for frame in video(given.frames)]
        begin_s = time.perf_counter()
        for scores, frame in zip(expected, video(given.frames), strict=True):
            assert torch.equal(split(frame), scores)
        one_by_one_s = time.perf_counter() - begin_s
        begin_s = time.perf_counter()
        for scores, answer in zip(expected, split.map(video(given.frames), depth=4), strict=True):
            assert torch.equal(answer, scores)
        streamed_s = time.perf_counter() - begin_s
        print(f"one by one {given.frames / one_by_one_s:.1f} frames/s, as a stream {given.frames / streamed_s:.1f}")
        print("every answer is equal to the unsplit model's, in the order of the frames")


if __name__ == "__main__":
    main()
