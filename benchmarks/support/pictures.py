"""A trained classifier of photographs, and photographs that it was not trained on.

The network is EfficientNet-Lite0 or Lite2 (``torchsurgeon.demo.lite``), its weights are in two packages that
``benchmarks/support/requirements.txt`` names. The photographs are objects with transparent surroundings from Debian's
``tuxpaint-stamps-default``, each put on a part of a photograph from Debian's packages of wallpapers, where a seed says
where and how large. scikit-learn's two photographs are held out with them. Nothing of it is part of this repository.
The packages are fetched with ``apt-get download`` once, unpacked into a cache, and not installed::

    python -m benchmarks.support.pictures
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from torchsurgeon.demo import Photograph
from torchsurgeon.demo.lite import DEVIATION, MEAN, SIZES, efficientnet_lite

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torchsurgeon" / "pictures"
OBJECTS = "tuxpaint-stamps-default"
WALLPAPERS = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds")
# Other folders hold drawings, letters and flags.
_FOLDERS = (
    "animals",
    "food",
    "hobbies",
    "household",
    "medical",
    "military",
    "plants",
    "space",
    "sports",
    "vehicles",
)
_DRAWN = ("cartoon", "toys", "plastic")
# These wallpapers are drawn, or show an object of ImageNet's so large that it would be the answer.
_UNFIT_WALLPAPERS = (
    "analogpattern",
    "umang",
    "Painting-Colors",
    "Fossa",
    "Infinite-Sea",
    "Elephants",
    "GreenTraditional",
    "friends",
)
# What is changed here changes every picture, and so every result that rests on them.
_SEED = 16


class Photographs(NamedTuple):
    """Photographs in two parts that share neither objects nor backgrounds.

    Attributes:
        sample: those to set something up with, ``uint8[N, 3, side, side]``.
        held_out: those to judge it with, ``uint8[M, 3, side, side]``.
        sample_names: what each picture of the sample shows, as the package's file is called.
        held_out_names: likewise for those held out.
    """

    sample: Tensor
    held_out: Tensor
    sample_names: tuple[str, ...]
    held_out_names: tuple[str, ...]


class MissingPackageError(Exception):
    """A package of photographs is neither in the cache nor can be fetched; the message says how to get it."""


def classifier(name: str = "lite0", *, pixels: bool = True) -> nn.Module:
    """Return EfficientNet-Lite with its trained weights, in evaluation mode.

    Args:
        name: ``"lite0"`` or ``"lite2"``.
        pixels: whether it takes photographs as bytes, ``uint8[N, 3, side, side]``, and normalizes them itself;
            otherwise it takes what ``normalized()`` returns.

    Raises:
        SpecError: the package of the weights is not installed.
    """
    net = efficientnet_lite(name)
    return Photograph(net, MEAN, DEVIATION).eval() if pixels else net


def side(name: str) -> int:
    """Return the height and width of the pictures that a classifier takes: 224 for Lite0, 260 for Lite2."""
    return SIZES[name].side


def normalized(pictures: Tensor) -> Tensor:
    """Return ``uint8`` pictures as the floats that a classifier without ``pixels`` takes."""
    return (pictures.float() / 255 - MEAN) / DEVIATION


@functools.cache
def labels() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes, in the order of the classifiers' scores."""
    from torchvision.models import EfficientNet_B0_Weights

    return tuple(EfficientNet_B0_Weights.DEFAULT.meta["categories"])


def photographs(side: int = 224, *, views: int = 1, held_out_views: int = 1) -> Photographs:
    """Return all photographs, the same at every call and on every machine with these packages.

    Args:
        side: height and width. Pictures of another size show the same.
        views: how many pictures of each object the sample holds; the second ones stand behind all first ones. They
            differ in place, size and background.
        held_out_views: likewise for those held out.

    Raises:
        MissingPackageError: a package of photographs is neither in the cache nor can be fetched.
    """
    _fetch()
    folder = CACHE / OBJECTS / "usr/share/tuxpaint/stamps"
    objects = [
        path
        for part in _FOLDERS
        for path in sorted((folder / part).rglob("*.png"))
        if not any(drawn in str(path.relative_to(folder)) for drawn in _DRAWN)
        if not path.stem.endswith(("_mirror", "_flip", "_mirror_flip"))
    ]
    walls = [
        path
        for package in WALLPAPERS
        for path in sorted((CACHE / package).rglob("*.jpg"))
        if not path.name.startswith(_UNFIT_WALLPAPERS)
    ]
    order = numpy.random.default_rng(_SEED).permutation(len(objects))
    shuffled = [objects[k] for k in order]
    middle = len(shuffled) // 2
    sample = [(path, view) for view in range(views) for path in shuffled[:middle]]
    held_out = [(path, view) for view in range(held_out_views) for path in shuffled[middle:]]
    own = _scikit_learn(side)
    return Photographs(
        torch.stack([_composed(path, view, walls[::2], side) for path, view in sample]),
        torch.stack([*own.values(), *(_composed(path, view, walls[1::2], side) for path, view in held_out)]),
        tuple(path.stem for path, _ in sample),
        (*own, *(path.stem for path, _ in held_out)),
    )


def packages() -> dict[str, str]:
    """Return the version of each Debian package that is in the cache."""
    _fetch()
    return {name: (CACHE / name / "version").read_text() for name in (OBJECTS, *WALLPAPERS)}


def _composed(path: Path, view: int, walls: Sequence[Path], side: int) -> Tensor:
    """Return an object on a part of a wallpaper; which part, how large and where follows from its name and the view."""
    from PIL import Image, ImageFilter

    random = numpy.random.default_rng((_SEED, zlib.crc32(path.stem.encode()), view))
    wall = _wall(walls[random.integers(len(walls))])
    part = random.uniform(0.3, 1) * min(wall.size)
    left, top = random.uniform(0, wall.width - part), random.uniform(0, wall.height - part)
    picture = wall.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + part, top + part))
    if random.random() < 0.5:  # a background out of focus, as behind near objects
        picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 4) * side / 224))
    with Image.open(path) as file:
        thing = file.convert("RGBA")
    thing = thing.crop(thing.getchannel("A").getbbox())
    factor = random.uniform(0.65, 0.95) * side / max(thing.size)
    thing = thing.resize([max(1, round(length * factor)) for length in thing.size], Image.Resampling.LANCZOS)
    if random.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    x, y = (round(random.uniform(0, side - length)) for length in thing.size)
    picture.paste(thing, (x, y), thing)
    return _pixels(picture)


@functools.cache
def _wall(path: Path) -> Any:
    """Return a wallpaper no larger than pictures need, since each is used many times."""
    from PIL import Image

    with Image.open(path) as image:
        image.draft("RGB", (1600, 1600))
        small = image.convert("RGB")
    small.thumbnail((1600, 1600), Image.Resampling.LANCZOS)
    return small


def _scikit_learn(side: int) -> dict[str, Tensor]:
    from PIL import Image, ImageOps
    from sklearn.datasets import load_sample_image

    images = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    return {name: _pixels(ImageOps.fit(image, (side, side))) for name, image in images.items()}


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()


def _fetch() -> None:
    """Download and unpack the packages that are not in the cache.

    Raises:
        MissingPackageError: that is not possible here.
    """
    for package in (OBJECTS, *WALLPAPERS):
        target = CACHE / package
        if (target / "version").exists():
            continue
        by_hand = (
            f"Get it by hand where it can be had (apt-get download {package}), unpack it with "
            f"dpkg-deb -x FILE {target}, and write its version into {target / 'version'}"
        )
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise MissingPackageError(
                    f"Debian's package {package} is fetched by {tool}, which is not here. {by_hand}"
                )
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            print(f"fetching Debian's package {package} …", flush=True)
            got = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
            files = list(Path(folder).glob("*.deb"))
            if not files:
                raise MissingPackageError(
                    f"apt-get download {package} failed: {got.stderr.strip()[-300:]}. Run apt-get update first. "
                    f"{by_hand}"
                )
            unpacked = Path(folder, "unpacked")
            subprocess.run(["dpkg-deb", "-x", files[0], unpacked], check=True)
            version = subprocess.run(
                ["dpkg-deb", "-f", files[0], "Version"], check=True, capture_output=True, text=True
            ).stdout.strip()
            (unpacked / "version").write_text(version)
            shutil.rmtree(target, ignore_errors=True)
            unpacked.rename(target)


if __name__ == "__main__":
    found = photographs()
    print(f"{len(found.sample)} photographs as a sample and {len(found.held_out)} held out; packages: {packages()}")
