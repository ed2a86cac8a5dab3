# PYTHON_ARGCOMPLETE_OK
"""The ``torchsurgeon`` command: reads the arguments, calls the rooms and prints; it has no logic of its own.

Each group of commands has a file, which declares them and runs them. A command imports what it needs when it is run, so
``--help``, ``--version`` and shell completion are quick and need neither PyTorch nor an extra.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

from torchsurgeon import __version__
from torchsurgeon.cli.arguments import Parser
from torchsurgeon.cli.capacity import add_simulate
from torchsurgeon.cli.codecs import add_codecs, add_distill
from torchsurgeon.cli.costs import add_calibrate, add_predict, add_profile
from torchsurgeon.cli.export import add_export
from torchsurgeon.cli.loadtest import add_bench_server
from torchsurgeon.cli.models import add_doctor, add_trace
from torchsurgeon.cli.plans import add_plan, add_sweep
from torchsurgeon.cli.running import add_demo, add_link, add_run
from torchsurgeon.cli.screen import advising
from torchsurgeon.cli.serving import add_serve
from torchsurgeon.errors import TorchSurgeonError, short

__all__ = ["main", "parser"]

# In the order in which help lists them.
_COMMANDS = (
    add_demo, add_trace, add_doctor, add_profile, add_calibrate, add_predict, add_codecs, add_distill, add_plan,
    add_sweep, add_simulate, add_serve, add_bench_server, add_run, add_export, add_link,
)  # fmt: skip

_EXAMPLES = """\
examples:
  torchsurgeon demo
  torchsurgeon serve alexnet=torchvision:alexnet
  torchsurgeon COMMAND --help

completion in bash and zsh:
  eval "$(register-python-argcomplete torchsurgeon)"
"""

_INSTALLED_WITH = {
    "argcomplete": "torchsurgeon[cli]",
    "rich": "torchsurgeon[cli]",
    "starlette": "torchsurgeon[server]",
    "uvicorn": "torchsurgeon[server]",
    "httptools": "torchsurgeon[server]",
    "safetensors": "torchsurgeon[server]",
    "tomli": "torchsurgeon[server]",
    "prometheus_client": "torchsurgeon[metrics]",
    "torchvision": "torchsurgeon[vision]",
    "PIL": "torchsurgeon[vision]",
    "matplotlib": "torchsurgeon[plot]",
    "plotly": "torchsurgeon[explore]",
    "torch": "torch",
    "onnx": "torchsurgeon[onnxruntime]",
    "torch_pruning": "torchsurgeon[distill]",
    "ray": "torchsurgeon[ray]",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and print its answer.

    Args:
        argv: the arguments, by default those of this process.

    Returns:
        The exit status: 0; 2 with the reason on standard error; 130 when interrupted; 141, as after SIGPIPE, when
        standard output was closed early.
    """
    commands = parser()
    try:
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete

            argcomplete.autocomplete(commands)  # ends the process
        given = sys.argv[1:] if argv is None else argv
        if not given:
            commands.print_help()
            return 0
        options = commands.parse_args(given)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A terminal that does not know "×" then shows "?" instead of failing.
                stream.reconfigure(errors="replace")
        with advising():
            options.run(options)
    except TorchSurgeonError as error:
        print(f"torchsurgeon: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _INSTALLED_WITH:
            raise
        print(f"torchsurgeon: this command needs {missing}: pip install '{_INSTALLED_WITH[missing]}'", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # What a shell reports of a program that ended because nobody reads its output any more, as ls | true does.
        sys.stderr.close()
        # The interpreter flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"torchsurgeon: {short(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"torchsurgeon: interrupted{f'; {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    root = Parser(
        prog="torchsurgeon",
        description="Split a PyTorch model between a device and a server.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"torchsurgeon {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return root
