"""Run a split model on one input again and again, and show where it is cut, why, and where the time goes."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from torchsurgeon.adapting import Estimates
from torchsurgeon.module import SplitModule
from torchsurgeon.report import bytes_text, rate_text, seconds_text
from torchsurgeon.report.narrow import shortened
from torchsurgeon.runtime import Inference
from torchsurgeon.runtime.bits import SAME
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
_FRAMES_PER_S = 8
# Characters: of the widest view, of its bars for counts, of the estimates, and of what stands beside these.
_WIDEST = 100
_COUNT_BAR, _LEAST_BAR = 24, 6
_LEFT, _RIGHT = 41, 30
_ERROR = 7
_GAP = "   "


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
        self.bits: Counter[str] = Counter()
        self.sent_bytes = 0

    def add(self, inference: Inference) -> None:
        """Count an inference."""
        self.done += 1
        self.latencies_s.append(max(inference.total_s, 0.0))
        self.cuts[_where(inference)] += 1
        self.bits[inference.bits] += 1
        self.sent_bytes += inference.sent_bytes
        if inference.degraded is not None:
            self.reasons[inference.degraded.partition(":")[0]] += 1


def summary(log: Log) -> str:
    """Return the summary of a run in one line: latencies, cuts, bytes sent, and reasons for degraded inferences."""
    times = sorted(log.latencies_s)
    spread = ""
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        spread = f", middle half {seconds_text(low)} … {seconds_text(high)}"
    cuts = ", ".join(f"{cut} {count}×" for cut, count in log.cuts.most_common())
    reasons = ", ".join(f"{reason} {count}×" for reason, count in log.reasons.most_common())
    bits = ", ".join(f"{text} {count}×" for text, count in log.bits.most_common())
    degraded = f"degraded: {reasons}" if reasons else "none degraded"
    return (
        f"{log.done} inferences, median {seconds_text(statistics.median(times))}{spread}; "
        f"cut: {cuts}; {bytes_text(log.sent_bytes)} sent; {bits}; {degraded}"
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
    """Return the live view, which fits itself to the terminal's width and height when it is drawn.

    It shows the last inference, the estimates of link, server and device, counts of cuts and of degraded inferences,
    the servers, and the latest latencies.
    """
    last = split.last
    return Text("waiting for the first answer") if last is None else _View(split, log, last)


def _where(inference: Inference) -> str:
    crossed = inference.sent_bytes or inference.wait_s or inference.local_s
    if not crossed:
        return "all on the device"
    return "all on the server" if inference.partition.index == 0 else f"after {inference.partition.name}"


class _View:
    """What the live view shows. It is gathered here, since another thread draws it later, maybe more than once."""

    def __init__(self, split: SplitModule, log: Log, last: Inference) -> None:
        of = f" of {log.wanted}" if log.wanted is not None else ""
        self._title = f"{split.name}, inference {log.done}{of}"
        self._last = last
        self._done = log.done
        self._counts = [(cut, count, "blue") for cut, count in log.cuts.most_common()]
        self._counts += [(text, count, "yellow") for text, count in log.bits.most_common() if text != SAME]
        self._counts += [(f"degraded: {reason}", count, "red") for reason, count in log.reasons.most_common()]
        self._servers = split.stats()["servers"]
        self._latencies_s = list(log.latencies_s)[-_WIDEST:]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _WIDEST)
        inner = width - 4
        # Two lines for the frame, and one below it, where the cursor stands.
        height = options.size.height - 3
        layouts = itertools.chain(
            [self._lines(console, inner, len(self._counts), spaced=True)],
            (self._lines(console, inner, most, spaced=False) for most in range(len(self._counts), 0, -1)),
        )
        lines: list[Text] = []
        for lines in layouts:
            if len(lines) <= height:
                break
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        yield Panel(Group(*lines[: max(height, 1)]), title=self._title, title_align="left", width=width)

    def _lines(self, console: Console, width: int, most_counts: int, *, spaced: bool) -> list[Text]:
        """The view in lines of at most ``width`` characters, with gaps between its parts where it is ``spaced``."""
        estimates = _estimates(self._last.decision.estimates, min(width, _LEFT)) if self._last.decision else []
        beside = bool(estimates) and width >= _LEFT + _RIGHT
        counts = self._count_lines(width - _LEFT - 3 if beside else width, most_counts)
        if beside:
            tables = [_side_by_side(estimates, counts)]
        else:
            tables = [part for part in (estimates, counts) if part]
        servers = [line for server in self._servers for line in _server_lines(server, width)]
        parts = [_last_lines(self._last, console, width), *tables, servers, [_latencies(self._latencies_s, width)]]
        gap = [Text()] if spaced else []
        return [line for i, part in enumerate(parts) for line in (*(gap if i else []), *part)]

    def _count_lines(self, width: int, most: int) -> list[Text]:
        """How often each cut was taken and inferences were degraded for each reason; the ``most`` frequent of these."""
        shown, more = self._counts[:most], len(self._counts) - most
        digits = len(str(self._done))
        names = [_brief(name, max(width - digits - _LEAST_BAR - 3, _LEAST_BAR)) for name, _, _ in shown]
        widest = max(map(len, names))
        longest = min(max(width - widest - digits - 3, 0), _COUNT_BAR)
        lines = [Text("so far", "dim")]
        for name, (_, count, colour) in zip(names, shown, strict=True):
            bar = "█" * max(1, round(longest * count / self._done))
            lines.append(Text.assemble(f"{name:<{widest}}  {count:>{digits}} ", (bar, colour)))
        return lines + ([Text(f"and {more} more", "dim")] if more else [])


def _last_lines(last: Inference, console: Console, width: int) -> list[Text]:
    """The last inference: where it was cut, what it took and was expected to take, who answered, and its parts."""
    items = [Text.assemble(("cut ", "dim"), (_brief(_where(last), width - 4), "bold"))]
    items.append(Text.assemble(("took ", "dim"), seconds_text(last.total_s)))
    if last.decision is not None:
        expected = seconds_text(last.decision.cost)
        items.append(Text.assemble(("expected ", "dim"), expected, (f" ({last.decision.reason})", "dim")))
    if last.sent_bytes:
        items.append(Text.assemble(("sent ", "dim"), bytes_text(last.sent_bytes)))
    if last.degraded is not None:
        answer = list(Text(f"degraded: {last.degraded}", "bold red").wrap(console, width))[:2]
    else:
        answer = [Text(f"answered by {last.server}" if last.server is not None else "answered here", "dim")]
    return [*_flow(items, width), *answer, _bar(last, width), *_flow(_legend(last), width)]


def _flow(items: Sequence[Text], width: int) -> list[Text]:
    """Items one after the other, as many in a line as there is room for."""
    lines: list[Text] = []
    for item in items:
        if lines and len(lines[-1]) + len(_GAP) + len(item) <= width:
            lines[-1].append(_GAP).append(item)
        else:
            lines.append(item.copy())
    return lines


def _side_by_side(left: Sequence[Text], right: Sequence[Text]) -> list[Text]:
    lines = []
    for one, other in itertools.zip_longest(left, right, fillvalue=Text()):
        lines.append(Text.assemble(one, " " * (_LEFT + 3 - len(one)), other))
    return lines


def _brief(name: str, most: int) -> str:
    """A name from ``_where()`` in at most ``most`` characters."""
    after = "after " if name.startswith("after ") else ""
    return after + shortened(name.removeprefix(after), most - len(after))


def _bar(last: Inference, width: int) -> Text:
    bar, passed_s, total_s = Text(), 0.0, max(last.total_s, 1e-9)
    for part, colour in _PARTS.items():
        passed_s += max(getattr(last, f"{part}_s"), 0.0)
        bar.append("█" * (min(round(width * passed_s / total_s), width) - len(bar)), colour)
    return bar


def _legend(last: Inference) -> list[Text]:
    shown = {part: getattr(last, f"{part}_s") for part in _PARTS}
    return [
        Text.assemble(("■ ", _PARTS[part]), f"{part} {seconds_text(seconds)}")
        for part, seconds in shown.items()
        if seconds >= last.total_s / 100
    ]


def _estimates(now: Estimates, width: int) -> list[Text]:
    link, load = now.link, now.load
    rows = (
        ("uplink", rate_text(link.uplink.value), link.uplink.error),
        ("downlink", rate_text(link.downlink.value), link.downlink.error),
        ("round trip", seconds_text(link.round_trip.value), link.round_trip.error),
        ("server's load", f"{load.compute.value:.2f}×, {seconds_text(load.queue_s)} wait", load.compute.error),
        ("device's slow-down", f"{now.slowdown.value:.2f}×", now.slowdown.error),
    )
    lines = [Text("estimates", "dim")]
    for name, value, error in rows:
        room = width - len(name) - _ERROR
        if room >= len(value) + 1:
            lines.append(Text.assemble(name, f"{value:>{room}}", (f"{f'±{error:.0%}':>{_ERROR}}", "dim")))
        else:
            lines.append(Text(f"{name}{value:>{max(width - len(name), len(value) + 1)}}"))
    return lines


def _server_lines(server: Mapping[str, Any], width: int) -> list[Text]:
    url = Text.assemble(("● ", "green" if server["usable"] else "red"), server["server"])
    return _flow([url, Text(f"{server['answers']} answers, breaker {server['breaker']}", "dim")], width)


def _latencies(latencies_s: Sequence[float], width: int) -> Text:
    top = max(*latencies_s, 1e-9)
    told = f"  up to {seconds_text(top)}"
    shown = latencies_s[-max(width - len(told), 1) :]
    line = "".join(_BLOCKS[min(int(len(_BLOCKS) * one / top), len(_BLOCKS) - 1)] for one in shown)
    return Text.assemble((line, "blue"), (told, "dim"))
