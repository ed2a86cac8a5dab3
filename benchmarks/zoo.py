"""The networks of the evaluation: the Neurosurgeon paper's eight applications, and networks of today.

``PAPER`` has the applications of Kang et al., Neurosurgeon (ASPLOS 2017), table 3, with their structures and input
sizes: AlexNet, VGG-19, DeepFace, LeNet, Kaldi's acoustic model and three of SENNA's taggers. A picture comes as bytes,
as a camera gives it, and the network's first step makes floats of them. Layers have the names that the authors' files
give them. Weights are random, except those of LeNet, which is trained on scikit-learn's digits.

``TODAY`` has networks of today, each as an application would call it.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Made = tuple[nn.Module, Any]
"""A network that is ready to be traced, and its example."""

DIGITS = 100
"""How many digits LeNet reads at once in the paper."""


class Pixels(nn.Module):
    """Makes floats from 0 to 1 of bytes."""

    def forward(self, picture: Tensor) -> Tensor:
        return picture.float() / 255


class Argmax(nn.Module):
    """The most probable class."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.argmax(dim=1)


class LocallyConnected2d(nn.Module):
    """A convolution that has weights of its own at every position, as DeepFace's last ones (Taigman et al., CVPR 2014).

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        in_side: height and width of what comes in.
        kernel: height and width of what one output sees.
        stride: how far apart two outputs look.
    """

    def __init__(self, in_channels: int, out_channels: int, in_side: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride, self.side = kernel, stride, (in_side - kernel) // stride + 1
        seen = in_channels * kernel**2
        self.weight = nn.Parameter(torch.empty(self.side**2, seen, out_channels).uniform_(-(seen**-0.5), seen**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_channels, self.side, self.side))

    def forward(self, x: Tensor) -> Tensor:
        seen = functional.unfold(x, self.kernel, stride=self.stride).permute(2, 0, 1)
        out = torch.bmm(seen, self.weight).permute(1, 2, 0)
        return out.unflatten(2, (self.side, self.side)) + self.bias


def named(*layers: tuple[str, nn.Module]) -> nn.Sequential:
    """Return layers in a row under their names, in inference mode."""
    return nn.Sequential(OrderedDict(layers)).eval()


def picture(channels: int, side: int, batch: int = 1) -> Tensor:
    """Return a random picture as bytes."""
    return torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8)


def imc() -> Made:
    """Return AlexNet as Caffe has it, for image classification."""
    return named(
        ("pixels", Pixels()),
        ("conv1", nn.Conv2d(3, 96, 11, 4)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(3, 2)),
        ("norm1", nn.LocalResponseNorm(5)),
        ("conv2", nn.Conv2d(96, 256, 5, padding=2, groups=2)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(3, 2)),
        ("norm2", nn.LocalResponseNorm(5)),
        ("conv3", nn.Conv2d(256, 384, 3, padding=1)),
        ("relu3", nn.ReLU()),
        ("conv4", nn.Conv2d(384, 384, 3, padding=1, groups=2)),
        ("relu4", nn.ReLU()),
        ("conv5", nn.Conv2d(384, 256, 3, padding=1, groups=2)),
        ("relu5", nn.ReLU()),
        ("pool5", nn.MaxPool2d(3, 2)),
        ("flat", nn.Flatten()),
        *_classifier(256 * 6**2, 1000),
    ), picture(3, 227)


def _classifier(features: int, classes: int) -> list[tuple[str, nn.Module]]:
    """Return the linear layers at the end of AlexNet and VGG."""
    return [
        ("fc6", nn.Linear(features, 4096)),
        ("relu6", nn.ReLU()),
        ("drop6", nn.Dropout()),
        ("fc7", nn.Linear(4096, 4096)),
        ("relu7", nn.ReLU()),
        ("drop7", nn.Dropout()),
        ("fc8", nn.Linear(4096, classes)),
        ("prob", nn.Softmax(1)),
        ("argmax", Argmax()),
    ]


def vgg() -> Made:
    """Return VGG-19, for image classification."""
    layers: list[tuple[str, nn.Module]] = [("pixels", Pixels())]
    channels = 3
    for block, (width, repeats) in enumerate([(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)], 1):
        for index in range(1, repeats + 1):
            layers.append((f"conv{block}_{index}", nn.Conv2d(channels, width, 3, padding=1)))
            layers.append((f"relu{block}_{index}", nn.ReLU()))
            channels = width
        layers.append((f"pool{block}", nn.MaxPool2d(2, 2)))
    return named(*layers, ("flat", nn.Flatten()), *_classifier(512 * 7**2, 1000)), picture(3, 224)


def face() -> Made:
    """Return DeepFace with 83 people, for face recognition."""
    return named(
        ("pixels", Pixels()),
        ("conv1", nn.Conv2d(3, 32, 11)),
        ("pool2", nn.MaxPool2d(3, 2, ceil_mode=True)),
        ("conv3", nn.Conv2d(32, 16, 9)),
        ("local4", LocallyConnected2d(16, 16, 63, 9)),
        ("local5", LocallyConnected2d(16, 16, 55, 7, 2)),
        ("local6", LocallyConnected2d(16, 16, 25, 5)),
        ("flat", nn.Flatten()),
        ("fc7", nn.Linear(16 * 21**2, 4096)),
        ("fc8", nn.Linear(4096, 83)),
        ("prob", nn.Softmax(1)),
        ("argmax", Argmax()),
    ), picture(3, 152)


def dig() -> Made:
    """Return LeNet, trained on scikit-learn's digits, with 100 digits to read."""
    model, _ = trained_lenet()
    pixels, _ = digits()
    return model, pixels[:DIGITS]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 handwritten digits at 28 × 28 pixels, as bytes, and which digit each is."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = torch.as_tensor(found.images / 16, dtype=torch.float32)[:, None]
    large = functional.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    return (large * 255).round().to(torch.uint8), torch.as_tensor(found.target)


@functools.cache
def trained_lenet(epochs: int = 8) -> tuple[nn.Sequential, float]:
    """Return LeNet and the share of digits it reads rightly among the 297 that it was not trained on.

    Args:
        epochs: how often it sees the 1,500 digits that it is trained on.
    """
    pixels, wanted = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = named(
            ("pixels", Pixels()),
            ("conv1", nn.Conv2d(1, 20, 5)),
            ("pool1", nn.MaxPool2d(2, 2)),
            ("conv2", nn.Conv2d(20, 50, 5)),
            ("pool2", nn.MaxPool2d(2, 2)),
            ("flat", nn.Flatten()),
            ("ip1", nn.Linear(50 * 4**2, 500)),
            ("relu1", nn.ReLU()),
            ("ip2", nn.Linear(500, 10)),
            ("prob", nn.Softmax(1)),
            ("argmax", Argmax()),
        )
        scores = model[:-2]
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(epochs):
            for rows in torch.randperm(1500).split(50):
                adam.zero_grad()
                functional.cross_entropy(scores(pixels[rows]), wanted[rows]).backward()
                adam.step()
    with torch.no_grad():
        right = (model(pixels[1500:]) == wanted[1500:]).float().mean()
    return model.requires_grad_(False), float(right)


def asr() -> Made:
    """Return Kaldi's acoustic model with 548 frames of speech."""
    layers: list[tuple[str, nn.Module]] = []
    for index in range(1, 7):
        layers += [(f"inner{index}", nn.Linear(440 if index == 1 else 2048, 2048)), (f"sig{index}", nn.Sigmoid())]
    return named(*layers, ("final_inner", nn.Linear(2048, 1706))), torch.rand(548, 440)


def tagger(features: int, tags: int) -> Made:
    """Return one of SENNA's taggers (Collobert et al., JMLR 2011) with a sentence of 28 words.

    Args:
        features: how many floats stand for a word and its neighbours.
        tags: between how many tags it decides.
    """
    layers = (("fc1", nn.Linear(features, 300)), ("htanh", nn.Hardtanh()), ("fc3", nn.Linear(300, tags)))
    return named(*layers), torch.rand(28, features)


PAPER: dict[str, Callable[[], Made]] = {
    "imc": imc,
    "vgg": vgg,
    "face": face,
    "dig": dig,
    "asr": asr,
    "pos": functools.partial(tagger, 300, 45),
    "ner": functools.partial(tagger, 375, 17),
    "chk": functools.partial(tagger, 300, 42),
}
NETWORKS = {
    "imc": "AlexNet (image classification)",
    "vgg": "VGG-19 (image classification)",
    "face": "DeepFace (facial recognition)",
    "dig": "LeNet-5 (digit recognition)",
    "asr": "Kaldi (speech recognition)",
    "pos": "SENNA (part-of-speech tagging)",
    "ner": "SENNA (named entity recognition)",
    "chk": "SENNA (word chunking)",
}
"""The paper's networks by application, and what each is for (its table 2)."""
LANGUAGE = ("pos", "ner", "chk")
"""The applications of natural language."""
PARAMETERS = {"imc": 60.95e6, "vgg": 143.65e6, "face": 102.7e6}
"""The paper's counts of parameters, to which ours are compared."""


def classifier(name: str) -> Made:
    """Return one of torchvision's classifiers with random weights, which takes a picture as bytes."""
    from torchvision.models import get_model

    return named(("pixels", Pixels()), ("model", get_model(name, weights=None))), picture(3, 224)


def lite0() -> Made:
    """Return EfficientNet-Lite0 with its trained weights where they are installed."""
    from torchsurgeon.demo import models

    return models.lite0()


def ssdlite() -> Made:
    """Return SSDlite on MobileNetV3, a detector of objects for phones."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, score_thresh=0.3)
    return model.eval(), torch.rand(1, 3, 320, 320)


def bert() -> Made:
    """Return BERT's base model with a sentence of 128 tokens."""
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig()).eval(), torch.randint(0, 30000, (1, 128))


def whisper() -> Made:
    """Return the encoder of Whisper's smallest model with the spectrum of 30 seconds of speech."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(WhisperConfig()).eval(), torch.rand(1, 80, 3000)


TODAY: dict[str, Callable[[], Made]] = {
    "EfficientNet-Lite0": lite0,
    "MobileNetV3": functools.partial(classifier, "mobilenet_v3_large"),
    "ResNet-50": functools.partial(classifier, "resnet50"),
    "ViT-B/16": functools.partial(classifier, "vit_b_16"),
    "Swin-T": functools.partial(classifier, "swin_t"),
    "SSDlite": ssdlite,
    "BERT": bert,
    "Whisper encoder": whisper,
}


def make(name: str) -> Made:
    """Return the network of this name and its example, the same in every process.

    Args:
        name: a name in ``PAPER`` or ``TODAY``.
    """
    with torch.random.fork_rng(devices=[]), contextlib.suppress(ImportError):
        torch.manual_seed(0)
        return (PAPER | TODAY)[name]()
    raise SystemExit(f"{name} needs a package that is not installed: pip install -e '.[dev]'")
