"""Run the evaluation and write its page: docs/evaluation.md, with its tables, its figures and the files behind them.

python -m benchmarks.evaluate                  # all of it, within an hour
python -m benchmarks.evaluate --quick          # a part, within five minutes, into build/evaluation
python -m benchmarks.evaluate --djinn DIRECTORY   # first read the authors' files anew
python -m benchmarks.evaluate --page           # only the page, from the files that there are
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import front_page, zoo
from benchmarks.evaluate import adaptation_page, alternatives, configurations, end_to_end, page, pictures, today
from benchmarks.evaluate.applications import APPLICATIONS
from benchmarks.evaluate.study import LINKS
from benchmarks.support import result_file

QUICK_APPLICATIONS = ("imc", "dig", "pos")
QUICK_FOLDER = result_file.RESULTS.parents[1] / "build" / "evaluation"
_APPLICATION_S, _TODAY_S, _END_TO_END_S, _ALTERNATIVES_S = 40.0, 20.0, 210.0, 360.0
_SLOW_S = {"SSDlite": 400.0}


class Progress:
    """Says on standard error what is done, how long it took, and how long the rest will take.

    Args:
        expected_s: what each step is expected to take, in seconds; only their ratios matter once steps are done.
    """

    def __init__(self, expected_s: list[float]) -> None:
        self._expected_s, self._done = expected_s, 0
        self._begun_s = time.monotonic()

    def step(self, what: str) -> None:
        """Say that a step is done."""
        self._done += 1
        spent_s = time.monotonic() - self._begun_s
        left_s = spent_s * sum(self._expected_s[self._done :]) / sum(self._expected_s[: self._done])
        count = f"[{self._done}/{len(self._expected_s)}]"
        print(f"{count} {what}; {_clock(spent_s)} spent, about {_clock(left_s)} left", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"a part of it, into {QUICK_FOLDER}")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    parser.add_argument("--djinn", type=Path, metavar="DIRECTORY", help="graph-gen/offloading of the authors' files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.djinn is not None:
        for script in ("applications", "devices"):
            _run(script, str(options.djinn))
    if not options.page:
        _evaluate(quick=options.quick)
    adaptation_page.draw(QUICK_FOLDER if options.quick else page.FOLDER)
    written = QUICK_FOLDER / "evaluation.md" if options.quick else page.PAGE
    written.write_text(page.page(QUICK_FOLDER if options.quick else page.FOLDER))
    print(f"written to {written}")
    if not options.quick:
        front_page.main()


def _evaluate(*, quick: bool) -> None:
    folder = QUICK_FOLDER if quick else page.FOLDER
    names = QUICK_APPLICATIONS if quick else APPLICATIONS
    networks = today.QUICK if quick else tuple(zoo.TODAY)
    quicker = tuple(name for name in end_to_end.NETWORKS if name not in end_to_end.SLOW)
    split, links = (end_to_end.QUICK, end_to_end.QUICK_LINKS) if quick else (quicker, LINKS)
    expected = [_APPLICATION_S] * len(names) + [_SLOW_S.get(name, _TODAY_S) for name in networks]
    rivalled = alternatives.QUICK if quick else tuple(n for n in alternatives.NETWORKS if n not in alternatives.SLOW)
    ends_s = [_END_TO_END_S] * len(split) + [_ALTERNATIVES_S] * len(rivalled)
    progress = Progress([*expected, *ends_s])
    # Neither of these two is timed, so they share the cores.
    with _begun("datacenter", *(["--quick"] if quick else [])) as simulation:
        result_file.write(folder / page.CONFIGURATIONS, _planned(names, progress))
        if simulation.wait():
            raise SystemExit("the datacenter could not be simulated; its message is above")
    if not quick:
        _run("datacenter_page")
    result_file.write(folder / page.TODAY, today.run(networks, told=progress.step))
    # Each network is written once it is done, so that nothing is lost where the rest is stopped.
    timed, beside = (result_file.known(folder / one.OUT.name) for one in (end_to_end, alternatives))
    for name in split:
        timed |= end_to_end.run([name], links, told=progress.step)
        ordered = {one: timed[one] for one in end_to_end.NETWORKS if one in timed}
        result_file.write(folder / end_to_end.OUT.name, ordered)
    for name in rivalled:
        beside |= alternatives.run([name], links, told=progress.step)
        ordered = {one: beside[one] for one in alternatives.NETWORKS if one in beside}
        result_file.write(folder / alternatives.OUT.name, ordered, packages=alternatives.versions())
    pictures.draw(page.read(folder, page.CONFIGURATIONS)["results"], folder)


def _planned(names: tuple[str, ...], progress: Progress) -> dict[str, Any]:
    results = configurations.run(names, progress.step)
    results["variants"] = configurations.variants(results["layers"])
    results["networks"] = {name: _described(name) for name in names}
    results["lenet_right"] = zoo.trained_lenet()[1]
    return results


def _described(name: str) -> dict[str, int]:
    model, example = zoo.make(name)
    return {
        "layers": len(configurations.Application.read(name).layers),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "input_bytes": example.numel() * example.element_size(),
    }


def _run(script: str, *arguments: str) -> None:
    subprocess.run(_command(script, *arguments), check=True)


@contextmanager
def _begun(script: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A script that runs beside the block, and ends with it."""
    with subprocess.Popen(_command(script, *arguments)) as process:
        try:
            yield process
        finally:
            process.terminate()


def _command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.evaluate.{script}", *arguments]


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


if __name__ == "__main__":
    main()
