"""Run a split model on one input again and again, and show where it is cut, why, and where the time goes."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from torchsurgeon.adapting import Estimates
from torchsurgeon.module import SplitModule
from torchsurgeon.report import bytes_text, rate_text, seconds_text
from torchsurgeon.runtime import Inference
from torchsurgeon.tracing.structure import flatten

_PARTS = {
    "head": "blue",
    "encode": "cyan",
    "uplink": "yellow",
    "queue": "red",
    "tail": "green",
    "downlink": "bright_yellow",
    "decode": "cyan",
    "wait": "red",
    "local": "magenta",
    "decide": "white",
}
_BLOCKS = "▁▂▃▄▅▆▇█"
_LATENCIES = 60
_BAR = 60
_COUNT_BAR = 24
_MOST_REASONS = 6
_FRAMES_PER_S = 8
_CLASSES = 5


def run(
    split: SplitModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    count: int | None = None,
    interval_s: float = 0.0,
    live: bool = False,
    console: Console | None = None,
) -> Any:
    """Call ``split`` again and again, and print a summary at the end.

    An interrupt ends the run and prints the summary, too. What a call raises ends the run without one.

    Args:
        split: the split model.
        args: positional arguments of every call.
        kwargs: keyword arguments of every call.
        count: how many calls; None for calls until an interrupt.
        interval_s: the shortest time from the start of one call to the start of the next.
        live: True to draw a live view, False to print a line for each inference.
        console: where to print; standard output by default.

    Returns:
        The answer of the last call.

    Raises:
        KeyboardInterrupt: the run is interrupted before its first answer.
    """
    console = console or Console()
    log = Log(count)
    answer = None
    screen = Live(console=console, refresh_per_second=_FRAMES_PER_S, transient=False) if live else None
    begin_s = time.monotonic()
    try:
        if screen is not None:
            screen.start()
        while count is None or log.done < count:
            answer = split(*args, **kwargs)
            last = split.last
            assert last is not None
            log.add(last)
            if screen is not None:
                screen.update(view(split, log))
            else:
                console.print(f"{log.done}  {last}", highlight=False, markup=False, soft_wrap=True)
            time.sleep(max(0.0, begin_s + log.done * interval_s - time.monotonic()))
    except KeyboardInterrupt:
        if not log.done:
            raise
    finally:
        if screen is not None:
            screen.stop()
    console.print(summary(log), highlight=False, markup=False, soft_wrap=True)
    return answer


class Log:
    """What has happened in a run so far.

    Args:
        wanted: how many inferences the run will have; None where it ends with an interrupt.
    """

    def __init__(self, wanted: int | None = None) -> None:
        self.wanted = wanted
        self.latencies_s: deque[float] = deque(maxlen=10_000)
        self.cuts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.done = 0
        self.sent_bytes = 0

    def add(self, inference: Inference) -> None:
        """Count an inference."""
        self.done += 1
        self.latencies_s.append(max(inference.total_s, 0.0))
        self.cuts[_where(inference)] += 1
        self.sent_bytes += inference.sent_bytes
        if inference.degraded is not None:
            self.reasons[inference.degraded.partition(":")[0]] += 1


def summary(log: Log) -> str:
    """Return the summary of a run in one line: latencies, cuts, bytes sent, and reasons for degraded inferences."""
    times = sorted(log.latencies_s)
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    cuts = ", ".join(f"{cut} {count}×" for cut, count in log.cuts.most_common())
    reasons = ", ".join(f"{reason} {count}×" for reason, count in log.reasons.most_common())
    return (
        f"{log.done} inferences, median {seconds_text(median)} ({seconds_text(low)} … {seconds_text(high)}); "
        f"cut: {cuts}; {bytes_text(log.sent_bytes)} sent; {f'degraded: {reasons}' if reasons else 'none degraded'}"
    )


def answer_text(answer: Any) -> str:
    """Return a text that describes an answer: the dtype and shape of each tensor, and the five largest of a row of
    scores."""
    lines = []
    for path, tensor in flatten(answer)[0]:
        name = ".".join(map(str, path)) or "answer"
        if not isinstance(tensor, torch.Tensor):
            lines.append(f"{name}: {tensor}")
            continue
        text = f"{name}: {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        if tensor.ndim == 2 and tensor.shape[0] == 1 and tensor.shape[1] > 1 and tensor.is_floating_point():
            scores, classes = tensor[0].topk(min(5, tensor.shape[1]))
            text += ", largest: " + ", ".join(
                f"{c} ({s:.3g})" for c, s in zip(classes.tolist(), scores.tolist(), strict=True)
            )
        lines.append(text)
    return "\n".join(lines)


def view(split: SplitModule, log: Log) -> RenderableType:
    """Return the live view: the last inference, the estimates of link, server and device, and counts of cuts and
    degraded inferences."""
    last = split.last
    if last is None:
        return Text("waiting for the first answer")
    of = f" of {log.wanted}" if log.wanted is not None else ""
    parts: list[RenderableType] = [_choice(last), _bar(last), _legend(last), Text()]
    if last.decision is not None:
        parts += [_estimates(last.decision.estimates), Text()]
    parts += [_counts(log), *_servers(split), _latencies(log)]
    return Panel(Group(*parts), title=f"{split.name}, inference {log.done}{of}", title_align="left", width=_BAR + 20)


def _where(inference: Inference) -> str:
    crossed = inference.sent_bytes or inference.wait_s or inference.local_s
    if not crossed:
        return "all on the device"
    return "all on the server" if inference.partition.index == 0 else f"after {inference.partition.name}"


def _choice(last: Inference) -> Text:
    text = Text.assemble(("cut  ", "dim"), (_where(last), "bold"), ("   took ", "dim"), seconds_text(last.total_s))
    if last.decision is not None:
        text.append("   expected ", "dim").append(seconds_text(last.decision.cost))
        text.append(f"   ({last.decision.reason})", "dim")
    if last.sent_bytes:
        text.append("   sent ", "dim").append(bytes_text(last.sent_bytes))
    if last.degraded is not None:
        text.append(f"\ndegraded  {last.degraded}", "bold red")
    else:
        text.append(f"\nanswered by {last.server}" if last.server is not None else "\nanswered here", "dim")
    return text


def _bar(last: Inference) -> Text:
    bar = Text()
    for part, colour in _PARTS.items():
        bar.append("█" * round(_BAR * getattr(last, f"{part}_s") / max(last.total_s, 1e-9)), colour)
    return bar


def _legend(last: Inference) -> Text:
    legend = Text()
    for part, colour in _PARTS.items():
        seconds = getattr(last, f"{part}_s")
        if seconds >= last.total_s / 100:
            legend.append("■ ", colour).append(f"{part} {seconds_text(seconds)}  ")
    return legend


def _estimates(now: Estimates) -> Table:
    link, load = now.link, now.load
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False)
    rows = (
        ("uplink", rate_text(link.uplink.value), link.uplink.error),
        ("downlink", rate_text(link.downlink.value), link.downlink.error),
        ("round trip", seconds_text(link.round_trip.value), link.round_trip.error),
        ("server's load", f"{load.compute.value:.2f}×, {seconds_text(load.queue_s)} wait", load.compute.error),
        ("device's slow-down", f"{now.slowdown.value:.2f}×", now.slowdown.error),
    )
    table.add_column("believed")
    table.add_column("", justify="right")
    table.add_column("±", justify="right")
    for name, value, error in rows:
        table.add_row(name, value, f"{error:.0%}")
    return table


def _counts(log: Log) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("so far")
    table.add_column("", justify="right")
    table.add_column("")
    rows = [(cut, count, "blue") for cut, count in log.cuts.most_common(_MOST_REASONS)]
    rows += [(f"degraded: {reason}", count, "red") for reason, count in log.reasons.most_common(_MOST_REASONS)]
    for name, count, colour in rows:
        table.add_row(name, str(count), Text("█" * max(1, round(_COUNT_BAR * count / log.done)), colour))
    return table


def _servers(split: SplitModule) -> list[Text]:
    lines = []
    for server in split.stats()["servers"]:
        line = Text.assemble("\n", ("● ", "green" if server["usable"] else "red"), server["server"])
        lines.append(line.append(f"  {server['answers']} answers, breaker {server['breaker']}", "dim"))
    return lines


def _latencies(log: Log) -> Text:
    shown = list(log.latencies_s)[-_LATENCIES:]
    top = max(*shown, 1e-9)
    line = "".join(_BLOCKS[min(int(len(_BLOCKS) * one / top), len(_BLOCKS) - 1)] for one in shown)
    return Text.assemble("\n", (line, "blue"), (f"  up to {seconds_text(top)}", "dim"))
