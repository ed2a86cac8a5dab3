"""Builds the extension ``torchsurgeon._C``; everything else stands in pyproject.toml.

``TORCHSURGEON_BUILD_EXT=1`` demands the extension, ``0`` leaves it out, and ``auto`` (the default) builds it where
PyTorch and a C++ compiler are found, and otherwise warns and goes on without it. With ``TORCHSURGEON_WERROR=1`` the
compiler's warnings are errors, which no compiler of a user's should make of them.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Wconversion"]
if os.environ.get("TORCHSURGEON_WERROR") == "1":
    WARNINGS.append("-Werror")
MODE = os.environ.get("TORCHSURGEON_BUILD_EXT", "auto")
if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"TORCHSURGEON_BUILD_EXT is {MODE!r}; it must be auto, 1 or 0")


def without_extension(reason: object) -> None:
    warnings.warn(
        f"torchsurgeon is built without its extension, so it cannot trace CUDA kernels: {reason}. "
        "Install g++ and PyTorch, then install again with --no-build-isolation.",
        stacklevel=2,
    )


def extension() -> dict[str, Any]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if MODE == "1":
                    raise
                without_extension(error)
            else:
                if not Path(self.get_ext_fullpath("torchsurgeon._C")).exists():
                    without_extension("the compiler's message is above")

    module = CppExtension(
        "torchsurgeon._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
        py_limited_api=True,
        optional=MODE == "auto",
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        # Without a standard here, PyTorch 2.10 and 2.11 would take C++17.
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", *WARNINGS],
        extra_link_args=["-ldl", "-Wl,-s"],
    )
    # PyTorch's headers are not ours to mend, so nothing in them is warned about.
    module.extra_compile_args += [argument for path in module.include_dirs for argument in ("-isystem", path)]
    module.include_dirs = []
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuild.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


arguments: dict[str, Any] = {}
if MODE != "0":
    try:
        arguments = extension()
    except ImportError as error:
        if MODE == "1":
            raise
        without_extension(error)
setup(**arguments)
