"""The ``torchsurgeon`` command. Reads arguments, calls the rooms, prints; no logic of its own.

Each group of commands has a file. A command imports what takes long or comes with an extra when it is run, so that
``--help`` is quick and an install without extras has the other commands.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from torchsurgeon import __version__
from torchsurgeon.cli.costs import add_calibrate, add_codecs, add_predict, add_profile
from torchsurgeon.cli.models import add_doctor, add_trace
from torchsurgeon.cli.plans import add_plan, add_sweep
from torchsurgeon.cli.running import add_demo, add_link, add_run, add_serve
from torchsurgeon.errors import TorchSurgeonError

__all__ = ["main"]

# As help lists them.
_COMMANDS = (
    add_demo, add_trace, add_doctor, add_profile, add_calibrate, add_predict, add_codecs, add_plan, add_sweep,
    add_serve, add_run, add_link,
)  # fmt: skip

_EXTRAS = {
    "rich": "cli",
    "starlette": "server",
    "uvicorn": "server",
    "httptools": "server",
    "safetensors": "server",
    "torchvision": "vision",
    "PIL": "vision",
    "matplotlib": "plot",
    "plotly": "explore",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 2 with the reason on standard error."""
    options = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show "×" shows "?"; the rest of the answer is worth having.
            stream.reconfigure(errors="replace")
    try:
        options.run(options)
    except TorchSurgeonError as error:
        print(f"torchsurgeon: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        print(
            f"torchsurgeon: this command needs {missing}: pip install 'torchsurgeon[{_EXTRAS[missing]}]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        print(f"torchsurgeon: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchsurgeon", description="Split a PyTorch model between a device and a server."
    )
    parser.add_argument("--version", action="version", version=f"torchsurgeon {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser
