"""Small models of awkward habits, which the project has written for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.case import Case, Factory, images, tokens

CASES: dict[str, Factory] = {}


def _own(make: Callable[[], Case]) -> Callable[[], Case]:
    def seeded() -> Case:
        torch.manual_seed(0)
        case = make()
        case.model.eval()
        return case

    CASES[f"own:{make.__name__.replace('_', ' ')}"] = seeded
    return make


def _model(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    made = type("Model", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            setattr(made, name, part)
        else:
            made.register_buffer(name, part)
    return made


@_own
def stages_in_Sequential() -> Case:
    def stage(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inside, outside, 3, 2, 1), nn.BatchNorm2d(outside), nn.GELU())

    body = nn.Sequential(stage(3, 8), nn.Sequential(stage(8, 16), stage(16, 16)))
    return Case(nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)), (images(1, 3, 32, 32),))


@_own
def LSTM() -> Case:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y, (h, _) = self.lstm(x)
        return self.head(y[:, -1] + h[-1])

    lstm = nn.LSTM(8, 16, num_layers=2, batch_first=True, bidirectional=True)
    model = _model(lambda self, x: self.head(self.lstm(x)[0][:, -1]), lstm=lstm, head=nn.Linear(32, 4))
    return Case(model, (images(1, 7, 8),), other=((images(3, 5, 8),), {}))


@_own
def GRU_with_a_state_in_and_out() -> Case:
    def forward(self: Any, x: torch.Tensor, h: torch.Tensor) -> Any:
        y, h = self.gru(x, h)
        return self.head(y), h

    model = _model(forward, gru=nn.GRU(8, 16), head=nn.Linear(16, 4))
    return Case(model, (images(7, 1, 8), images(1, 1, 16)), other=((images(5, 3, 8), images(1, 3, 16)), {}))


@_own
def LSTM_then_GRU_states_used() -> Case:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y, (h, c) = self.lstm(x)
        z, g = self.gru(y)
        return {"last": self.head(z[:, -1]), "states": (h, c, g)}

    lstm, gru = nn.LSTM(8, 16, batch_first=True), nn.GRU(16, 16, batch_first=True)
    return Case(_model(forward, lstm=lstm, gru=gru, head=nn.Linear(16, 4)), (images(1, 7, 8),))


@_own
def MultiheadAttention_with_weights() -> Case:
    def forward(self: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
        y, weights = self.attention(x, x, x, key_padding_mask=mask)
        return self.head(y + x), weights

    model = _model(forward, attention=nn.MultiheadAttention(16, 4, batch_first=True), head=nn.Linear(16, 4))
    mask = torch.zeros(1, 6, dtype=torch.bool)
    return Case(model, (images(1, 6, 16), mask), other=((images(2, 9, 16), torch.zeros(2, 9, dtype=torch.bool)), {}))


@_own
def TransformerEncoder() -> Case:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return Case(nn.TransformerEncoder(layer, 2), (images(1, 6, 16),), other=((images(3, 9, 16),), {}))


@_own
def Transformer() -> Case:
    model = nn.Transformer(16, 4, 2, 2, 32, batch_first=True)
    return Case(model, (images(1, 6, 16), images(1, 4, 16)), other=((images(3, 9, 16), images(3, 5, 16)), {}))


@_own
def tied_weights_and_integer_input() -> Case:
    def forward(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.mix(self.embed(tokens))))

    embed, out = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
    out.weight = embed.weight
    model = _model(forward, embed=embed, mix=nn.Linear(16, 16), out=out)
    return Case(model, (tokens(1, 8) % 50,), other=((tokens(3, 5) % 50,), {}))


@_own
def several_inputs_and_a_dict_of_outputs() -> Case:
    def forward(self: Any, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor | None = None) -> Any:
        a, b = self.see(image).mean((2, 3)), self.read(text)
        joint = a * b if scale is None else a * b * scale
        return {"joint": joint, "parts": [a, b], "score": (joint.sum(1), torch.sigmoid(joint))}

    model = _model(forward, see=nn.Conv2d(3, 8, 3), read=nn.Linear(6, 8))
    return Case(model, (images(1, 3, 16, 16), images(1, 6)), {"scale": images(1, 8)})


@_own
def buffers_and_a_mask() -> Case:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        scores = (x @ x.transpose(1, 2)).masked_fill(~self.causal[:length, :length], float("-inf"))
        return self.out(scores.softmax(-1) @ (x + self.positions[:length]))

    causal = torch.ones(32, 32, dtype=torch.bool).tril()
    model = _model(forward, causal=causal, positions=images(32, 16), out=nn.Linear(16, 4))
    return Case(model, (images(1, 6, 16),), other=((images(2, 11, 16),), {}))


@_own
def UNet_with_skips_and_interpolation() -> Case:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.one(x))
        b = torch.relu(self.two(nn.functional.max_pool2d(a, 2)))
        up = nn.functional.interpolate(b, size=a.shape[2:], mode="bilinear", align_corners=False)
        return self.out(torch.cat([up, a], 1))

    convs = {"one": nn.Conv2d(3, 8, 3, padding=1), "two": nn.Conv2d(8, 8, 3, padding=1), "out": nn.Conv2d(16, 2, 1)}
    return Case(_model(forward, **convs), (images(1, 3, 33, 47),), other=((images(2, 3, 20, 30),), {}))


@_own
def UNet_with_transposed_convolutions() -> Case:
    def block(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        a = self.down_1(x)
        b = self.down_2(nn.functional.max_pool2d(a, 2))
        c = self.bottom(nn.functional.max_pool2d(b, 2))
        b = self.up_2(torch.cat([self.grow_2(c), b], 1))
        return self.out(self.up_1(torch.cat([self.grow_1(b), a], 1)))

    blocks = {"down_1": block(3, 8), "down_2": block(8, 16), "bottom": block(16, 32)}
    blocks |= {"up_2": block(32, 16), "up_1": block(16, 8)}
    growing = {"grow_2": nn.ConvTranspose2d(32, 16, 2, 2), "grow_1": nn.ConvTranspose2d(16, 8, 2, 2)}
    return Case(_model(forward, **blocks, **growing, out=nn.Conv2d(8, 2, 1)), (images(1, 3, 64, 64),))


@_own
def compiled_by_torch() -> Case:
    inner = stages_in_Sequential()
    return Case(torch.compile(inner.model, backend="eager"), inner.args)  # type: ignore[arg-type]


@_own
def a_part_compiled_by_torch() -> Case:
    part = torch.compile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)), backend="eager")
    return Case(nn.Sequential(part, nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(3)), (images(1, 3, 12, 12),))


@_own
def bfloat16_with_float32_statistics() -> Case:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y = self.conv(x.to(torch.bfloat16))
        return self.out(y.float().mean((2, 3))), y.argmax(1), y > 0

    model = _model(forward, conv=nn.Conv2d(3, 8, 3).bfloat16(), out=nn.Linear(8, 3))
    return Case(model, (images(1, 3, 16, 16),))


@_own
def complex_numbers_by_FFT() -> Case:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.fft.rfft2(self.inside(x)) * self.filter
        return self.outside(torch.fft.irfft2(y, s=x.shape[-2:]))

    convs = {"inside": nn.Conv2d(3, 4, 3, padding=1), "outside": nn.Conv2d(4, 2, 1)}
    weights = torch.complex(images(4, 16, 9), images(4, 16, 9))
    return Case(_model(forward, **convs, filter=weights), (images(1, 3, 16, 16),))


@_own
def branch_on_values_inside_a_part() -> Case:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.mean() > 0.5 else x - 1

    layers = (nn.Conv2d(3, 8, 3), Gate(), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return Case(nn.Sequential(*layers), (images(1, 3, 12, 12),))
