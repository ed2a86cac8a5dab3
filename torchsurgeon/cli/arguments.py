"""Arguments that several commands have, and what their text means."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torchsurgeon import _whole_file
from torchsurgeon.cli import completion
from torchsurgeon.cli.completion import completed, one_of
from torchsurgeon.cli.screen import loading
from torchsurgeon.errors import TorchSurgeonError, short

if TYPE_CHECKING:
    import torch

    from torchsurgeon.tracing import LayerGraph

    Commands = argparse._SubParsersAction["Parser"]

# argparse quotes a wrong argument as a whole, and the commands beside it.
_MOST_ERROR_CHARACTERS = 500
# PyTorch ends the process where the system does not give it the threads that it asks for.
_MOST_THREADS = 1024


class Parser(argparse.ArgumentParser):
    """A parser of arguments whose errors stay short, whatever was given. Parsers of commands are of the same class.

    Attributes:
        extend: returns the arguments to parse in place of those that were given; None to parse those.
    """

    extend: Callable[[Parser, Sequence[str]], list[str]] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; called by argparse.

        It would have the program's own parser report what the parser of a command does not know, with the wrong usage.
        """
        found, unknown = super().parse_known_args(args if self.extend is None else self.extend(self, args), namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and end the process."""
        super().error(short(message, _MOST_ERROR_CHARACTERS, quote=False))


SPEC_HELP = "the model: torchvision:NAME, package.module:FACTORY, or a .pt2 file"
WEIGHTS_HELP = "a .safetensors or .pt file of a state_dict(), or 'default' for torchvision's trained ones"


def command(
    commands: Commands, run: Callable[[argparse.Namespace], None], name: str, sentence: str, *examples: str
) -> Parser:
    """Declare a command, and return its parser.

    Args:
        commands: what the command is added to.
        run: runs the command. It imports what it needs when it is called, so that declaring it is quick.
        name: the command's name.
        sentence: what the command does.
        examples: the arguments of calls that help shows as examples.
    """
    added = commands.add_parser(
        name,
        help=sentence,
        description=sentence,
        epilog="\n".join(["examples:", *(f"  torchsurgeon {name} {example}".rstrip() for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(run=run)
    return added


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that name a model and say how it is traced."""
    completed(parser.add_argument("spec", metavar="SPEC", help=SPEC_HELP), completion.specs)
    parser.add_argument(
        "--input",
        metavar="SPEC",
        help="example input, such as x:float32[1,3,224,224] (default: the example that the model comes with)",
    )
    leaf_argument(parser, "MODULE", "keep this submodule whole, as one layer")


def leaf_argument(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    """Declare ``--leaf``, which may be repeated, and ``--no-verify``."""
    parser.add_argument(
        "--leaf", action="append", default=[], metavar=metavar, help=f"{what}; may be repeated (default: none)"
    )
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not run the model to compare it with what was traced (default: run both and compare their bits)",
    )


def device_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare ``--device``, where PyTorch runs."""
    action = parser.add_argument("--device", default="cpu", help=f"{what}: cpu, cuda or cuda:1 (default: %(default)s)")
    completed(action, one_of(("cpu", "cuda")))


def weights_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--weights`` of one model."""
    action = parser.add_argument(
        "--weights", metavar="FILE", help=f"the model's weights: {WEIGHTS_HELP} (default: random ones)"
    )
    completed(action, one_of(("default",), "safetensors", "pt", "pth"))


def file_argument(parser: argparse.ArgumentParser, option: str, what: str, default: str = "not written") -> None:
    """Declare an option that takes a file; ``default`` says what happens without it."""
    parser.add_argument(option, type=Path, metavar="FILE", help=f"{what} (default: {default})")


def check_files(*files: Path | None) -> None:
    """Check that the files that a command is to write can be written, before it measures what they will hold.

    Raises:
        TorchSurgeonError: one of them cannot.
    """
    for file in files:
        if file is not None:
            _whole_file.check_writable(file, TorchSurgeonError)


def threads_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--threads``."""
    parser.add_argument(
        "--threads",
        type=whole_number(1, _MOST_THREADS),
        metavar="N",
        help="CPU threads of one inference (default: as many as PyTorch chooses)",
    )


def judged_by(sample: str | Path | None, limits: str | None, prefix: str) -> dict[str, Any]:
    """Return what ``find_backend()`` needs besides a name, as it was given on the command line.

    Args:
        sample: a folder of images; None where none is given.
        limits: limits on how answers may change, as ``parse_budget()`` takes them; None where none are given.
        prefix: what stands before ``sample`` and ``limits`` in the names of the options.

    Raises:
        TorchSurgeonError: there is no such folder.
        CodecError: the limits are not valid.
    """
    from torchsurgeon.accuracy.limits import parse_budget

    if sample is not None and not Path(sample).is_dir():
        raise TorchSurgeonError(f"{prefix}sample must be a folder of images; there is no folder {short(str(sample))}")
    return {"sample": sample, "budget": None if limits is None else parse_budget(limits)}


def traced(options: argparse.Namespace, device: torch.device | None = None, weights: str | None = None) -> LayerGraph:
    """Load and trace the model that ``model_arguments()`` name.

    Args:
        options: the parsed arguments.
        device: where the model and its example are put; None for the CPU.
        weights: what ``--weights`` says; None for random ones.
    """
    with loading():
        import torch
        from torch.utils import _pytree

        from torchsurgeon.models import specs
        from torchsurgeon.tracing import trace

    loaded = specs.load(options.spec, input_spec=options.input, weights=weights)
    args, kwargs = loaded.args, loaded.kwargs
    if device is not None:
        loaded.model.to(device)
        args, kwargs = _pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
    return trace(loaded.model, *args, leaf_modules=options.leaf, verify=options.verify, **kwargs)


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the function that turns the text of an argument into a whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        is_number = text.isascii() and text.isdigit() and len(text) <= 18
        if not is_number or int(text) < least or (most is not None and int(text) > most):
            end = "on" if most is None else f"to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} {end}; got {short(text)}")
        return int(text)

    return parse


def number(text: str, given: str | None = None) -> float:
    """Return the number that the text of an argument means.

    Args:
        text: the text of the number.
        given: the whole argument, which the message quotes; None where ``text`` is that.

    Raises:
        ArgumentTypeError: the text is no number, or not a finite one.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number; got {short(text if given is None else given)}")
    return value


def seconds(text: str) -> float:
    """Return the seconds that the text of an argument means: a number of them, or one followed by "s" or "ms".

    Raises:
        ArgumentTypeError: the text is no such number, or not a finite one.
    """
    plain = text.strip()
    for unit, factor in (("ms", 1e-3), ("s", 1.0)):
        if plain.endswith(unit):
            return number(plain.removesuffix(unit), text) * factor
    return number(text)


def positive(text: str) -> float:
    """Return the number above zero that the text of an argument means.

    Raises:
        ArgumentTypeError: the text is no finite number, or not one above zero.
    """
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be a positive number; got {short(text)}")
    return value


def port_number(text: str) -> int:
    """Return the port that the text of an argument means; 0 asks the system for a free one.

    Raises:
        ArgumentTypeError: the text is no whole number from 0 to 65535.
    """
    # The system would take 65536 and more, and use another port.
    if not (text.isascii() and text.isdigit()) or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port number from 0 to 65535; got {short(text)}")
    return int(text)


def index_or_name(text: str) -> int | str:
    """Return a partition point as an argument names it: its index, or the name of a layer."""
    return int(text) if text.isascii() and text.isdigit() else text


def pairs(texts: Sequence[str], what: str, *, last_wins: bool = False) -> dict[str, str]:
    """Return the values of ``NAME=VALUE`` arguments by name.

    Args:
        texts: the arguments.
        what: what they are and how they are written, as the message says it ("--weights must be NAME=FILE").
        last_wins: whether a name may be given twice, and the last value counts.

    Raises:
        TorchSurgeonError: a text has no name, no "=" or no value, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise TorchSurgeonError(f"{what}; got {short(text)}")
        if name in found and not last_wins:
            raise TorchSurgeonError(f"each name may be given once; {short(name)} is given twice")
        found[name] = value
    return found


def lists(texts: Sequence[str], what: str) -> dict[str, list[str]]:
    """Return the values of ``NAME=VALUE`` arguments by name, where a name may be given several times.

    Args:
        texts: the arguments.
        what: as in ``pairs()``.

    Raises:
        TorchSurgeonError: a text has no name, no "=" or no value.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        for name, value in pairs([text], what).items():
            found.setdefault(name, []).append(value)
    return found
