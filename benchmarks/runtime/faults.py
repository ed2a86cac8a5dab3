"""What a SplitModule answers while links and servers break: right or wrong, in time or late, and when it is back.

Inferences one after another on random inputs, each with a deadline. In every block of five one, at a random place,
meets a fault, drawn in a random order of which every kind comes equally often. The fault lasts until that inference is
answered, and befalls probes and trials as well. Then it ends: a killed server is started again, a stopped one goes on.
From that moment on the time is taken until an inference is answered by the server again. Inferences that only wait
for this are made every 10 ms and are checked like all others, beyond ``--count``.

The model is small (60 ms on the device, which is paced, under 1 ms on the server), so the server is always worth
asking, and the tail here has to start well before the deadline. The processes are this one, with the device and the
link in two threads, and the server. Names are made not to be found by answering so in place of ``socket.getaddrinfo``.

    python -m benchmarks.runtime.faults [--count 2000] [--deadline 0.1] [--out benchmarks/results/runtime_faults.json]
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchsurgeon as ts
from benchmarks.support.faulty_link import FaultyLink
from benchmarks.support.paced_device import paced
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.tail_process import TailProcess, middle, seeded

EVERY = 5
RETURN_S = 2.0
GIVE_UP_S = 10.0
HOST = "localhost"
DEVICE_S = 0.06


def small(seed: int) -> tuple[nn.Module, torch.Tensor]:
    def make() -> nn.Module:
        convolutions = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 15 * 15, 10))

    return seeded(make, seed), torch.zeros(1, 3, 32, 32)


@dataclass
class Tally:
    """What became of the inferences that met one kind of fault."""

    injected: int = 0
    met: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    latency_s: list[float] = field(default_factory=list)
    return_s: list[float] = field(default_factory=list)


class Trial:
    """One SplitModule behind a breaking link, and what it answered."""

    def __init__(self, split: ts.SplitModule, model: nn.Module, deadline_s: float, seed: int) -> None:
        self.split, self.model, self.deadline_s = split, model, deadline_s
        self.inputs = torch.Generator().manual_seed(seed)
        self.asked = self.lost = self.wrong = self.late = 0
        self.latest_s = 0.0
        self.failures: list[str] = []

    def infer(self) -> float:
        """Make one inference, note what is wrong with it, and return its seconds."""
        x = torch.rand(1, 3, 32, 32, generator=self.inputs)
        with torch.no_grad():
            truth = self.model(x)
        self.asked += 1
        begin = time.perf_counter()
        try:
            answer = self.split(x)
        except Exception as error:
            self.lost += 1
            self.failures.append(f"inference {self.asked}: {type(error).__name__}: {error}")
            return time.perf_counter() - begin
        taken = time.perf_counter() - begin
        self.wrong += not torch.equal(answer, truth)
        if taken > self.deadline_s * 1.1:
            self.late += 1
            self.failures.append(f"inference {self.asked} took {taken * 1e3:.0f} ms: {self.split.last}")
        self.latest_s = max(self.latest_s, taken)
        return taken

    @property
    def by_server(self) -> bool:
        last = self.split.last
        return last is not None and last.degraded is None and last.sent_bytes > 0

    def until_back(self, since: float) -> float:
        """Infer until the server answers; return the seconds since ``since``."""
        while True:
            self.infer()
            if self.by_server or time.perf_counter() - since > GIVE_UP_S:
                return time.perf_counter() - since
            time.sleep(0.01)


class Faults:
    """Every kind of fault: how it begins and how it ends."""

    def __init__(self, link: FaultyLink, server: TailProcess) -> None:
        self.link, self.server = link, server
        self.nameless = False
        self.kinds: dict[str, Callable[[], None]] = {
            "kill -9 in mid-request": lambda: link.begin("killed", server.kill),
            "stop and continue": lambda: link.begin("stopped", server.pause),
            "connection reset": lambda: link.begin("reset"),
            "answer cut short": lambda: link.begin("cut short"),
            "byte flipped in request": lambda: link.begin("flipped request"),
            "byte flipped in answer": lambda: link.begin("flipped answer"),
            "500": lambda: link.begin("500"),
            "503": lambda: link.begin("503"),
            "one byte a second": lambda: link.begin("a byte a second"),
            "black hole": lambda: link.begin("black hole"),
            "name not found": self._no_name,
            "other weights after restart": self._other_weights,
        }

    def begin(self, kind: str) -> None:
        self.kinds[kind]()

    def end(self, kind: str) -> None:
        self.nameless = False
        self.link.end()
        if kind == "stop and continue":
            self.server.resume()
        if kind in ("other weights after restart", "kill -9 in mid-request"):
            self.server.kill()
            self.server.start()

    def _no_name(self) -> None:
        self.link.begin("no name")
        self.nameless = True
        self.link.drop()

    def _other_weights(self) -> None:
        self.link.begin("other weights")
        self.server.kill()
        self.server.start(seed=7)

    @contextmanager
    def names(self) -> Iterator[None]:
        """While this is entered, looking up ``HOST`` fails when it shall."""
        known = socket.getaddrinfo

        def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
            if self.nameless and host == HOST:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return known("127.0.0.1" if host == HOST else host, *arguments, **options)

        socket.getaddrinfo = look_up
        try:
            yield
        finally:
            socket.getaddrinfo = known


def inject(trial: Trial, faults: Faults, count: int, seed: int) -> dict[str, Tally]:
    choice = random.Random(seed)
    order: list[str] = []
    tallies = {kind: Tally() for kind in faults.kinds}
    for _ in range(count // EVERY):
        place = choice.randrange(EVERY)
        for at in range(EVERY):
            if at != place:
                trial.infer()
                continue
            if not trial.by_server:
                trial.until_back(time.perf_counter())
            if not order:
                order = choice.sample(list(tallies), len(tallies))
            kind = order.pop()
            tally = tallies[kind]
            struck = faults.link.struck
            faults.begin(kind)
            tally.latency_s.append(trial.infer())
            last = trial.split.last
            tally.injected += 1
            tally.met += faults.link.struck > struck or (last is not None and last.degraded is not None)
            tally.reasons[why(last)] += 1
            faults.end(kind)
            tally.return_s.append(trial.until_back(time.perf_counter()))
    return tallies


def why(last: ts.Inference | None) -> str:
    """Why the answer came from where it came."""
    if last is None:
        return "nothing"
    if last.degraded is not None:
        return last.degraded.partition(":")[0]
    return "by the server" if last.server is not None else "here by choice"


def show(trial: Trial, tallies: dict[str, Tally]) -> None:
    print(f"{'fault':28} {'times':>5} {'met':>5} {'median':>9} {'latest':>9} {'back':>8}  answered because")
    for kind, tally in tallies.items():
        if not tally.injected:
            continue
        reasons = ", ".join(f"{count} {reason}" for reason, count in tally.reasons.most_common(3))
        print(
            f"{kind:28} {tally.injected:5} {tally.met:5} {middle(tally.latency_s)['median_s'] * 1e3:6.0f} ms "
            f"{max(tally.latency_s) * 1e3:6.0f} ms {max(tally.return_s):6.2f} s  {reasons}"
        )
    print(
        f"{trial.asked} inferences: {trial.lost} lost, {trial.wrong} wrong, {trial.late} later than the deadline of "
        f"{trial.deadline_s * 1e3:.0f} ms plus 10 % (the latest {trial.latest_s * 1e3:.0f} ms)"
    )
    for failure in trial.failures[:10]:
        print(" ", failure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--deadline", type=float, default=0.1, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "runtime_faults.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # A server with other weights is one of the faults, and warned of.
    warnings.simplefilter("ignore")
    model, example = small(0)
    _, here, device = paced(model, example, DEVICE_S)
    with TailProcess(small) as server, FaultyLink(server.port, options.seed) as link:
        faults = Faults(link, server)
        with faults.names():
            split = ts.SplitModule(
                model,
                example,
                server=f"http://{HOST}:{link.port}",
                backend=device.wrap,
                deadline_s=options.deadline,
                device_profile=here,
            )
            with split:
                trial = Trial(split.prepare(), model, options.deadline, options.seed)
                trial.until_back(time.perf_counter())
                if not trial.by_server:
                    # Every fault would be waited for in vain, which took hours.
                    sys.exit(f"the server was not asked within {GIVE_UP_S:g} s: {split.stats()['servers']}")
                begin = time.perf_counter()
                tallies = inject(trial, faults, options.count, options.seed)
                taken_s = time.perf_counter() - begin
    show(trial, tallies)
    back_s = [one for tally in tallies.values() for one in tally.return_s]
    results = {
        "asked": options.count,
        "inferences": trial.asked,
        "faults": sum(tally.injected for tally in tallies.values()),
        "lost": trial.lost,
        "wrong": trial.wrong,
        "deadline_s": options.deadline,
        "late": trial.late,
        "latest_s": round(trial.latest_s, 4),
        "back_late": sum(one > RETURN_S for one in back_s),
        "back_latest_s": round(max(back_s, default=0.0), 3),
        "taken_s": round(taken_s, 1),
        "kinds": {
            kind: {
                "injected": tally.injected,
                "met": tally.met,
                "latency": middle(tally.latency_s),
                "latest_s": round(max(tally.latency_s), 4),
                "back": middle(tally.return_s),
                "back_latest_s": round(max(tally.return_s), 3),
                "degraded": dict(tally.reasons.most_common()),
            }
            for kind, tally in tallies.items()
            if tally.injected
        },
        "failures": trial.failures[:20],
    }
    print(f"back on the server after at most {max(back_s, default=0.0):.2f} s; {taken_s:.0f} s in all")
    write(options.out, results)
    return int(bool(trial.lost or trial.wrong or trial.late or results["back_late"]))


if __name__ == "__main__":
    sys.exit(main())
