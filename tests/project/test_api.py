"""What the package exports is what it says it exports."""

from __future__ import annotations

import inspect

import torchsurgeon


def test_all_is_exactly_what_is_public() -> None:
    public = {
        name
        for name, value in vars(torchsurgeon).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert set(torchsurgeon.__all__) == public


def test_every_error_of_the_package_is_exported() -> None:
    from torchsurgeon import errors

    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined <= set(torchsurgeon.__all__)


def test_every_error_is_drawn_in_the_tree() -> None:
    from torchsurgeon import errors

    for name, value in vars(errors).items():
        if inspect.isclass(value):
            assert name in (errors.__doc__ or ""), name
