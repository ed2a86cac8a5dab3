"""Small models, each with one thing that makes it hard to cut in two."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CASES: dict[str, Callable[[], tuple[Any, ...]]] = {}
Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Detection:
    scores: torch.Tensor
    boxes: torch.Tensor | None = None
    label: str = "none"


def case(factory: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[Any, ...]]:
    """Register a factory of ``(model, *args)`` or ``(model, *args, kwargs)``."""
    CASES[factory.__name__] = factory
    return factory


def model(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module whose forward is the given function of itself and its inputs."""

    class Small(nn.Module):
        pass

    Small.forward = forward
    made = Small()
    for name, part in parts.items():
        if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
            made.register_buffer(name, part)
        else:
            setattr(made, name, part)
    return made.eval()


def image(batch: int = 2, channels: int = 4, size: int = 6) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def conv(inside: int = 4, outside: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


# --- in-place layers ---


@case
def relu_in_place_on_a_tensor_that_also_crosses():
    def forward(self, x):
        y = self.conv(x)
        z = self.relu(y)
        return self.last(z) + y

    return model(forward, conv=conv(), relu=nn.ReLU(inplace=True), last=conv()), image()


@case
def relu_in_place_after_the_tensor_was_read():
    def forward(self, x):
        y = self.conv(x)
        before = self.last(y)
        z = self.relu(y)
        return before + z * y

    return model(forward, conv=conv(), relu=nn.ReLU(inplace=True), last=conv()), image()


@case
def augmented_add():
    def forward(self, x):
        y = self.conv(x)
        kept = y
        y += x
        y *= 2
        return self.last(y) + kept

    return model(forward, conv=conv(), last=conv()), image()


@case
def overwriting_its_own_input():
    def forward(self, x):
        x += 1
        x = self.relu(x)
        return self.conv(x) + x

    return model(forward, conv=conv(), relu=nn.ReLU(inplace=True)), image()


@case
def item_assignment():
    def forward(self, x):
        y = self.conv(x)
        y[:, 0] = 0
        y[:, 1] = x[:, 2]
        return self.last(y)

    return model(forward, conv=conv(), last=conv()), image()


@case
def item_assignment_then_the_slice_read_through_an_older_view():
    def forward(self, x):
        y = self.conv(x)
        older = y[:, 1]
        y[:, 1] = x[:, 2]
        z = self.last(y)
        return z.sum(1) + older

    return model(forward, conv=conv(), last=conv()), image()


@case
def multiplying_a_chunk_in_place():
    def forward(self, x):
        y = self.conv(x)
        a, b = y.chunk(2, dim=1)
        a.mul_(3)
        c = self.last(y)
        return c + torch.cat([b, a], 1)

    return model(forward, conv=conv(), last=conv()), image()


@case
def adding_into_a_slice_read_later_through_the_base():
    def forward(self, x):
        y = self.conv(x)
        part = y[:, :2]
        part.add_(1)
        z = self.relu(y)
        part.mul_(2)
        return self.last(z), y

    return model(forward, conv=conv(), relu=nn.ReLU(), last=conv()), image()


@case
def overwriting_a_transpose():
    def forward(self, x):
        y = self.conv(x)
        flipped = y.transpose(2, 3)
        flipped.relu_()
        flipped[:, 0] += 1
        return self.last(y), flipped.contiguous()

    return model(forward, conv=conv(), last=conv()), image()


@case
def overwriting_the_base_of_an_expanded_view():
    def forward(self, x):
        y = self.conv(x).mean((2, 3), keepdim=True)
        wide = y.expand(-1, -1, 6, 6)
        y.add_(1)
        return self.last(wide) + y

    return model(forward, conv=conv(), last=conv()), image()


@case
def a_view_of_a_view_overwritten_twice():
    def forward(self, x):
        y = self.conv(x)
        flat = y.flatten(2)
        half = flat[:, :, :18]
        half.sigmoid_()
        flat.mul_(2)
        z = self.last(y)
        half.add_(1)
        return z + y, half

    return model(forward, conv=conv(), last=conv()), image()


@case
def a_scratch_buffer_filled_in_forward():
    def forward(self, x):
        y = self.conv(x)
        out = torch.zeros(2, 8, 6, 6)
        out[:, :4] = y
        out[:, 4:] = self.last(y)
        return out * 2

    return model(forward, conv=conv(), last=conv()), image()


@case
def a_scratch_buffer_of_the_inputs_size():
    def forward(self, x):
        y = self.conv(x)
        out = x.new_zeros(x.shape[0], 8, x.shape[2], x.shape[3])
        out[:, :4] = y
        out[:, 4:].copy_(self.last(y))
        return out * 2

    return model(forward, conv=conv(), last=conv()), image(), [image(3)]


@case
def torch_out_argument():
    def forward(self, x):
        y = self.conv(x)
        z = torch.empty_like(y)
        torch.mul(y, 2, out=z)
        return self.last(z) + y

    return model(forward, conv=conv(), last=conv()), image()


@case
def functional_in_place():
    def forward(self, x):
        y = self.conv(x)
        kept = y * 1
        F.relu(y, inplace=True)
        F.hardtanh_(kept)
        return self.last(y) + kept

    return model(forward, conv=conv(), last=conv()), image()


@case
def in_place_through_dropout_and_identity():
    def forward(self, x):
        y = self.conv(x)
        same = self.identity(self.dropout(y))
        same.add_(1)
        return self.last(y) + same

    return model(forward, conv=conv(), last=conv(), dropout=nn.Dropout(0.5), identity=nn.Identity()), image()


@case
def writing_through_a_tuple_of_chunks():
    def forward(self, x):
        parts = torch.chunk(self.conv(x), 2, 1)
        parts[0].add_(parts[1])
        parts[1].mul_(parts[0])
        return self.last(torch.cat(parts, 1))

    return model(forward, conv=conv(), last=conv()), image()


@case
def a_contiguous_that_is_no_copy():
    def forward(self, x):
        y = self.conv(x)
        z = y.contiguous()
        z.add_(1)
        w = self.last(z)
        return w + y

    return model(forward, conv=conv(), last=conv()), image()


@case
def detached_and_overwritten():
    def forward(self, x):
        y = self.conv(x)
        y.detach().zero_()[0] = 1
        return self.last(y)

    return model(forward, conv=conv(), last=conv()), image()


@case
def index_put_and_masked_fill():
    def forward(self, x):
        y = self.conv(x)
        y.masked_fill_(y > 0.5, 0.5)
        y.index_add_(1, self.where, x)
        z = self.last(y)
        z[z < 0] = 0
        return z + y

    return model(forward, conv=conv(), last=conv(), where=torch.tensor([1, 0, 3, 2])), image()


@case
def two_inputs_swapped_in_place():
    def forward(self, x, y):
        kept = x.clone()
        x.copy_(y)
        y.copy_(kept)
        return self.conv(x) - y

    return model(forward, conv=conv()), image(), image() * 2


@case
def one_tensor_given_twice():
    def forward(self, x, y):
        return self.conv(x) - y

    same = image()
    return model(forward, conv=conv()), same, same


# --- parameters and submodules ---


@case
def shared_submodule_called_twice():
    def forward(self, x):
        return self.conv(self.relu(self.conv(self.relu(self.conv(x)))))

    return model(forward, conv=conv(), relu=nn.ReLU(inplace=True)), image(), [image(5)]


@case
def tied_parameters():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight

    def forward(self, x):
        return F.linear(self.second(self.first(x)), self.first.weight, self.second.bias)

    return model(forward, first=first, second=second), torch.randn(3, 8), [torch.randn(5, 8)]


@case
def parameters_at_the_root():
    def forward(self, x):
        y = x * self.scale
        token = self.token.expand(x.shape[0], -1, -1)
        y = torch.cat([token, y], dim=1) + self.position
        y = self.linear(y)
        return y[:, 0] + self.token[0] + self.offset

    return (
        model(
            forward,
            scale=nn.Parameter(torch.randn(8)),
            token=nn.Parameter(torch.randn(1, 1, 8)),
            position=nn.Parameter(torch.randn(1, 6, 8)),
            linear=nn.Linear(8, 8),
            offset=torch.randn(8),
        ),
        torch.randn(2, 5, 8),
        [torch.randn(3, 5, 8)],
    )


@case
def a_returned_parameter():
    def forward(self, x):
        return self.conv(x), self.scale, self.scale * 2

    return model(forward, conv=conv(), scale=nn.Parameter(torch.randn(3))), image()


@case
def deeply_nested_modules_used_one_by_one():
    inner = nn.Sequential(OrderedDict(a=nn.Sequential(conv(), nn.ReLU(inplace=True)), b=conv()))

    def forward(self, x):
        y = self.inner.a[0](x)
        z = self.inner(x)
        return self.inner.b(y + z) * self.inner.b.bias.sum()

    return model(forward, inner=inner), image()


@case
def the_same_module_under_two_names():
    shared = conv()

    def forward(self, x):
        return self.two(self.one(x)) + self.one(x)

    return model(forward, one=shared, two=shared), image()


@case
def module_list_and_dict():
    def forward(self, x):
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return self.heads["b"](found[0]) + self.heads["a.x".replace(".", "_")](torch.stack(found).sum(0))

    layers = nn.ModuleList([conv(), nn.ReLU(inplace=True), conv()])
    return model(forward, layers=layers, heads=nn.ModuleDict({"b": conv(), "a_x": conv()})), image()


# --- outputs ---


@case
def outputs_tuple_with_the_same_tensor_twice():
    def forward(self, x):
        y = self.conv(x)
        return y, x, y, (self.last(y), [y])

    return model(forward, conv=conv(), last=conv()), image()


@case
def outputs_namedtuple():
    return model(lambda self, x: Pair(self.conv(x), self.last(self.conv(x))), conv=conv(), last=conv()), image()


@case
def outputs_dict_with_constants():
    def forward(self, x):
        y = self.conv(x)
        return {"a": y, "b": {"c": None, "d": 3, "e": self.last(y)}, "f": "text", "g": torch.float32, "h": []}

    return model(forward, conv=conv(), last=conv()), image()


@case
def outputs_ordered_dict():
    def forward(self, x):
        y = self.conv(x)
        return OrderedDict(z=self.last(y), a=y)

    return model(forward, conv=conv(), last=conv()), image()


@case
def outputs_dict_with_integer_keys():
    def forward(self, x):
        y = self.conv(x)
        return {0: y, 1: self.last(y)}

    return model(forward, conv=conv(), last=conv()), image()


@case
def outputs_dataclass():
    def forward(self, x):
        y = self.conv(x)
        return Detection(scores=self.last(y).mean((1, 2)), label="cat")

    return model(forward, conv=conv(), last=conv()), image()


@case
def outputs_nested():
    def forward(self, x):
        y = self.conv(x)
        return [Detection(y, self.last(y)), (y.sum(), Pair(None, {"x": [y * 2]}))]

    return model(forward, conv=conv(), last=conv()), image()


@case
def output_is_the_input():
    return model(lambda self, x: (x, self.conv(x)), conv=conv()), image()


@case
def output_is_a_view_of_another_output():
    def forward(self, x):
        y = self.conv(x)
        return y, y[:, 0], y.flatten(1).unbind(1)[3]

    return model(forward, conv=conv()), image()


@case
def outputs_numbers_read_off_tensors():
    def forward(self, x):
        y = self.conv(x)
        return y, x.shape[0], y.size(), y.dim()

    return model(forward, conv=conv()), image()


@case
def outputs_as_a_layer_gave_them():
    def forward(self, x):
        y, weights = self.attend(x, x, x, need_weights=False)
        return self.lstm(y), {"top": y.topk(2), "parts": torch.chunk(y, 2, 1)}, weights, y.dtype

    return model(forward, attend=nn.MultiheadAttention(8, 2), lstm=nn.LSTM(8, 4)), torch.randn(3, 5, 8)


# --- several values from one layer, numbers that cross ---


@case
def split_unbind_and_max():
    def forward(self, x):
        y = self.conv(x)
        a, b = torch.split(y, [1, 3], dim=1)
        values, places = torch.max(b, dim=1)
        first, _, _, rest = self.last(y).unbind(1)
        top = y.flatten(1).topk(3)
        return a * values.unsqueeze(1), places, first + rest, top.indices, top[0], top

    return model(forward, conv=conv(), last=conv()), image()


@case
def sizes_that_cross():
    def forward(self, x):
        size = x.shape[-2:]
        batch, channels = x.shape[0], x.size(1)
        y = self.conv(F.max_pool2d(x, 2))
        y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
        y = y.reshape(batch, channels * size[0], -1)
        return y / (x.size(-1) ** 0.5), y.view(x.size(0), -1)

    return model(forward, conv=conv()), image(), [image(3)]


@case
def sizes_of_what_was_thrown_away():
    def forward(self, x):
        small = self.pool(self.conv(x))
        flat = small.mean((2, 3))
        return flat.unsqueeze(-1).expand(x.shape[0], 4, small.shape[2] * x.shape[3])

    return model(forward, conv=conv(), pool=nn.MaxPool2d(2)), image(), [image(4)]


@case
def torch_size_kept_whole():
    def forward(self, x):
        size = x.size()
        y = self.conv(x).flatten()
        return y.view(size) + torch.zeros(size[1:]) + x.new_ones(x.shape)

    return model(forward, conv=conv()), image(), [image(3)]


@case
def floats_and_bools_computed_from_sizes():
    def forward(self, x):
        y = self.conv(x)
        scale = 1 / (x.shape[1] * float(2)) ** 0.5
        wide = x.size(3) / 3
        return self.last(y) * scale * wide

    return model(forward, conv=conv(), last=conv()), image()


@case
def zero_dimensional_tensors():
    def forward(self, x):
        total = x.mean()
        y = self.conv(x) * total
        return y - y.max(), total

    return model(forward, conv=conv()), image()


@case
def shape_unpacked():
    def forward(self, x):
        b, c, h, w = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
        y = self.conv(x).view(b, c // 2, 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return self.last(y)

    return model(forward, conv=conv(), last=conv()), image(), [image(1)]


@case
def dtype_and_device_read_off_tensors():
    def forward(self, x):
        y = self.conv(x)
        steps = torch.arange(6, device=y.device, dtype=y.dtype)
        return self.last(y + steps).to(x.dtype).type_as(y)

    return model(forward, conv=conv(), last=conv()), image()


# --- inputs ---


@case
def several_inputs_and_keywords():
    def forward(self, x, y=None, *, scale=1.0, mask=None, flag=False):
        x = self.conv(x)
        if y is not None:
            x = x + y
        if flag:
            x = -x
        return x * scale * mask

    return model(forward, conv=conv()), image(), {"mask": image() > 0, "flag": True}


@case
def lists_and_dicts_of_tensors_as_input():
    def forward(self, images, more):
        a, b = images
        return self.conv(a) + self.last(b) * more["x"], more["y"][0]

    both = [image(), image() * 2]
    return model(forward, conv=conv(), last=conv()), both, {"x": image(), "y": (image(), 3)}, {}


@case
def star_arguments():
    def forward(self, *images, **named):
        return self.conv(images[0]) + images[1] * named["scale"]

    return model(forward, conv=conv()), image(), image(), {"scale": torch.tensor(2.0)}


@case
def an_unused_input():
    return model(lambda self, x, unused: self.conv(x).relu(), conv=conv()), image(), image(2, 3, 9)


# --- dtypes and layouts ---


@case
def integers_and_bools():
    def forward(self, ids, keep):
        y = self.embed(ids)
        keep = keep & (ids > 2)
        y = y.masked_fill(keep.unsqueeze(-1), 0.0)
        places = y.argmax(-1)
        return self.linear(y), places * 2, ~keep, places.to(torch.uint8)

    ids = torch.arange(12).reshape(2, 6)
    return model(forward, embed=nn.Embedding(20, 8), linear=nn.Linear(8, 4)), ids, ids % 2 == 0


@case
def uint8_image_in():
    def forward(self, x):
        y = x.permute(0, 3, 1, 2).float() / 255
        y = (y - self.mean) / self.std
        return self.last(F.avg_pool2d(y, 2))

    stats = {"mean": torch.rand(3, 1, 1), "std": torch.rand(3, 1, 1) + 1}
    return model(forward, last=conv(3, 4), **stats), torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)


@case
def bfloat16_inside():
    def forward(self, x):
        y = self.conv(x).to(torch.bfloat16)
        return (y * y.sigmoid()).half().double().relu() + x.double()

    return model(forward, conv=conv()), image()


@case
def float64_throughout():
    return model(
        lambda self, x: self.last(self.conv(x).relu()), conv=conv().double(), last=conv().double()
    ), image().double()


@case
def channels_last_input():
    def forward(self, x):
        y = self.relu(self.conv(x))
        a, b = y.chunk(2, 1)
        return self.last(torch.cat([b, a], 1)) + y.mean((2, 3), keepdim=True), y

    made = model(forward, conv=conv(), last=conv(), relu=nn.ReLU(inplace=True))
    return made, image().to(memory_format=torch.channels_last)


@case
def channels_last_weights():
    def forward(self, x):
        y = self.relu(self.norm(self.conv(x)))
        return self.last(y).flatten(1)

    made = model(forward, conv=conv(), norm=nn.BatchNorm2d(4), last=conv(), relu=nn.ReLU(inplace=True))
    return made.to(memory_format=torch.channels_last), image()


@case
def slices_of_channels_last_into_convolutions():
    def forward(self, x):
        y = self.conv(x)
        a, b = y[:, :4], y[:, 4:]
        return self.left(a) + self.right(b), a.sum((1, 2))

    made = model(forward, conv=conv(4, 8), left=conv(), right=conv())
    return made, image(2, 4, 16).to(memory_format=torch.channels_last)


@case
def strided_rows_into_a_linear_layer():
    def forward(self, x):
        y = self.norm(x)
        return self.linear(y[:, 0]), self.linear(y[:, ::2]).softmax(-1), y.transpose(0, 1).mean((0, 2))

    return model(forward, norm=nn.LayerNorm(48), linear=nn.Linear(48, 40)), torch.randn(5, 7, 48)


@case
def an_expanded_tensor_that_crosses():
    def forward(self, x):
        y = self.conv(x).mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)
        return self.last(y.relu()) + y, y

    return model(forward, conv=conv(), last=conv()), image()


@case
def not_a_number_and_infinity():
    return model(lambda self, x: self.conv(x / 0).relu() * torch.nan, conv=conv()), image()


@case
def an_empty_tensor():
    def forward(self, x):
        y = self.conv(x)
        return torch.cat([y[:, :0], y[:, 1:]], 1)

    return model(forward, conv=conv()), image()


# --- whole families ---


@case
def recurrent():
    def forward(self, x):
        y, (h, c) = self.lstm(x)
        z, last = self.gru(y)
        return self.linear(z[:, -1]), h, c.transpose(0, 1), last

    made = model(
        forward, lstm=nn.LSTM(6, 8, 2, batch_first=True), gru=nn.GRU(8, 5, batch_first=True), linear=nn.Linear(5, 3)
    )
    return made, torch.randn(3, 4, 6), [torch.randn(5, 4, 6)]


@case
def attention():
    def forward(self, x):
        y, weights = self.attend(x, x, x, need_weights=True)
        q, k, v = self.qkv(y).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v) + self.encoder(x), weights

    return (
        model(
            forward,
            attend=nn.MultiheadAttention(8, 2, batch_first=True),
            qkv=nn.Linear(8, 24),
            encoder=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        ),
        torch.randn(3, 5, 8),
        [torch.randn(2, 5, 8)],
    )


@case
def wide_parallel_branches():
    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1).sum(1)

    branches = nn.ModuleList([nn.Sequential(conv(), nn.ReLU(inplace=True), conv()) for _ in range(6)])
    return model(forward, branches=branches), image(), [image(1)]


@case
def nothing_but_views():
    return model(lambda self, x: x.flatten(1).view(2, 4, 36).transpose(1, 2)[:, 3:]), image()


@case
def a_tensor_made_of_python_numbers():
    def forward(self, x):
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
        return self.conv(x) * scale + torch.ones(6).cumsum(0)

    return model(forward, conv=conv()), image(), [image(4)]


@case
def comparison_of_everything_with_einsum():
    def forward(self, x):
        y = torch.einsum("bchw,dc->bdhw", x, self.weight)
        return torch.where(y > 0, y, x * 2).logsumexp(1)

    return model(forward, weight=nn.Parameter(torch.randn(4, 4))), image(), [image(3)]
