"""Whether random small models give their own answers, are refused by name, or silently give others.

Each model is drawn from a seed, traced, cut at its first, a middle and its last point, and called with the example,
with other values and with other sizes. Every answer is compared with the model's own, bit for bit. Each failure is
made smaller as long as it fails in the same way, and failures with the same fragments left are counted as one cause.

    python -m benchmarks.coverage.fuzz --count 2000 --seed 0          # writes benchmarks/results/fuzz.json
    python -m benchmarks.coverage.fuzz --count 1 --seed 1234 --show   # one model, with its source and its verdict
    python -m benchmarks.coverage.fuzz --count 300 --only 'hook'      # models with fragments of this name
"""

from __future__ import annotations

import argparse
import re
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests" / "support"))
from random_models import BASE, NO_PROCESS, PRELUDE, RandomModel, is_repeatable, random_model
from verdicts import FAILURES, RAW_ERROR, REFUSED, Verdict, judge

from benchmarks.support.result_file import RESULTS, write


class Late(BaseException):
    """A model took longer than it may. No ``except Exception`` of a model or a tracer catches it."""


def timed(model: RandomModel, limit_s: float) -> Verdict:
    """Judge a model; one that is not done in time is a failure too."""

    def late(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return judge(model)
    except Late:
        return Verdict(RAW_ERROR, f"not done in {limit_s:.0f} s")
    except Exception:
        return Verdict(RAW_ERROR, traceback.format_exc()[-1000:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def shrunk(model: RandomModel, verdict: Verdict, limit_s: float) -> tuple[RandomModel, Verdict]:
    """Return the smallest model found, by leaving out pieces, that fails in the same way."""
    for smaller in model.smaller():
        if is_repeatable(smaller) and (found := timed(smaller, limit_s)).outcome == verdict.outcome:
            return shrunk(smaller, found, limit_s)
    return model, verdict


def kinds(model: RandomModel) -> list[str]:
    return sorted({name for name in model.uses if name != "layer: linear"})


def own_source(model: RandomModel) -> str:
    """The model's source without what all have in common."""
    text = model.source.removeprefix(PRELUDE)
    for common in (BASE, NO_PROCESS):
        text = text.replace(common, "")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    outcomes, followed, calls, sources = Counter[str](), Counter[str](), Counter[str](), set[int]()
    fragments: dict[str, Counter[str]] = {}
    causes: dict[tuple[str, ...], dict[str, Any]] = {}
    refusals: dict[str, Counter[str]] = {}
    trace_s: list[float] = []
    begin = time.perf_counter()
    for seed in range(options.seed, options.seed + options.count):
        model = random_model(seed)
        if not re.search(options.only, "\n".join(model.uses)):
            continue
        verdict = timed(model, options.limit)
        sources.add(hash(model.source.rpartition("def make()")[0]))
        outcomes[verdict.outcome] += 1
        followed[verdict.traced_by or "not followed"] += 1
        calls += verdict.calls
        trace_s.append(verdict.trace_s)
        for name in set(model.uses):
            fragments.setdefault(name, Counter())[verdict.outcome] += 1
        if verdict.outcome == REFUSED:
            refusals.setdefault(re.sub(r"'[^']*'|\d+", "…", verdict.detail)[:160], Counter())[str(seed)] += 1
        if verdict.outcome in FAILURES:
            note(causes, model, verdict, options)
        if options.show:
            print(f"# seed {seed}: {verdict}\n{own_source(model)}")
        done = seed - options.seed + 1
        if done % 100 == 0 and not options.show:
            counted = ", ".join(f"{n} {what}" for what, n in outcomes.most_common())
            print(f"{done:5} models, {time.perf_counter() - begin:.0f} s: {counted}", flush=True)
    return {
        "models": sum(outcomes.values()),
        "different_sources": len(sources),
        "seconds": round(time.perf_counter() - begin, 1),
        "trace_median_s": statistics.median(trace_s or [0.0]),
        "trace_max_s": max(trace_s, default=0.0),
        "outcomes": dict(outcomes.most_common()),
        "followed": dict(followed.most_common()),
        "calls": dict(sorted(calls.items())),
        "refusals": {text: [sum(c.values()), next(iter(c))] for text, c in most(refusals)},
        "fragments": {name: dict(count) for name, count in sorted(fragments.items())},
        "causes": sorted(causes.values(), key=lambda cause: (cause["outcome"], -cause["count"])),
    }


def note(
    causes: dict[tuple[str, ...], dict[str, Any]], model: RandomModel, verdict: Verdict, options: argparse.Namespace
) -> None:
    """Count a failure under its cause: one that is known if it has all its fragments, else what is left of it."""
    held = set(model.uses)
    for known, cause in causes.items():
        if known[0] == verdict.outcome and len(known) > 1 and held.issuperset(known[1:]) and not options.every:
            cause["count"] += 1
            cause["seeds"] = [*cause["seeds"], model.seed][:20]
            return
    small, last = (model, verdict) if options.whole else shrunk(model, verdict, options.limit)
    key = (verdict.outcome, *kinds(small))
    if key in causes:
        causes[key]["count"] += 1
        return
    causes[key] = {
        "outcome": last.outcome,
        "fragments": kinds(small),
        "count": 1,
        "seeds": [model.seed],
        "detail": last.detail,
        "traced_by": last.traced_by,
        "source": own_source(small),
    }
    print(f"\n# {last.outcome}, seed {model.seed}, {last.traced_by}: {last.detail}\n{own_source(small)}", flush=True)


def most(counted: dict[str, Counter[str]]) -> list[tuple[str, Counter[str]]]:
    return sorted(counted.items(), key=lambda item: -sum(item[1].values()))


def summary(found: dict[str, Any]) -> str:
    lines = [f"\n{found['models']} models ({found['different_sources']} different) in {found['seconds']:.0f} s"]
    lines += [f"  {n:6} {what}" for what, n in found["outcomes"].items()]
    lines += ["followed by"] + [f"  {n:6} {what}" for what, n in found["followed"].items()]
    lines += ["calls"] + [f"  {n:6} {what}" for what, n in found["calls"].items()]
    lines += ["refusals, and a seed of each"]
    lines += [f"  {n:6} {text} ({seed})" for text, (n, seed) in list(found["refusals"].items())[:30]]
    lines += ["fragments in failures"]
    bad = {name: sum(n for what, n in count.items() if what in FAILURES) for name, count in found["fragments"].items()}
    lines += [
        f"  {n:6} of {sum(found['fragments'][name].values())} {name}"
        for name, n in sorted(bad.items(), key=lambda item: -item[1])[: 60 if any(bad.values()) else 0]
        if n
    ]
    lines += ["causes"]
    lines += [
        f"  {c['count']:6} {c['outcome']}: {', '.join(c['fragments'])} (seed {c['seeds'][0]})" for c in found["causes"]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="how many seeds")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--only", default="", help="a regular expression that the name of a model's fragment matches")
    parser.add_argument("--show", action="store_true", help="print every model's source and verdict")
    parser.add_argument("--every", action="store_true", help="make every failure smaller, also one of a known cause")
    parser.add_argument("--whole", action="store_true", help="make no failure smaller, which is quicker")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a model may take")
    parser.add_argument("--out", type=Path, help="the file to write (default: fuzz.json of all fragments, else none)")
    options = parser.parse_args(arguments)
    found = run(options)
    print(summary(found))
    out = options.out or (None if options.only or options.show or options.count < 2000 else RESULTS / "fuzz.json")
    if out is not None:
        write(out, found)
    raise SystemExit(1 if any(found["outcomes"].get(what) for what in FAILURES) else 0)


if __name__ == "__main__":
    main()
