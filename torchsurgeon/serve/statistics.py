"""What the requests of one model have taken: all of them since it was loaded, and those of the last seconds."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Over so many seconds, and over so many answers at most, "lately" goes.
LATELY_S = 10.0
_MOST_RECENT = 2048
# A client decides what it cuts, so what is counted by cut is bounded. The rest counts as "other".
MOST_CUTS = 100


@dataclass
class _Runs:
    """What runs of one size have taken together."""

    count: int = 0
    decode_s: float = 0.0
    compute_s: float = 0.0
    encode_s: float = 0.0


class Statistics:
    """What requests of one model have taken. Thread-safe.

    Attributes:
        by_requests: how often so many requests ran together.
        cuts: how many requests had the same tensors, by the tensors' names as the log tells them.
    """

    def __init__(self) -> None:
        self.by_requests: dict[int, int] = {}
        self.cuts: dict[str, int] = {}
        self._begun_s = time.perf_counter()
        self._lock = threading.Lock()
        self._requests = self._samples = self._failed = 0
        self._failed_s = self._queue_s = self._last_s = 0.0
        # By the number of samples: of single runs, and of each request the run that it was a part of.
        self._runs: dict[int, _Runs] = {}
        self._whole = _Runs()
        # Of each request: when it ended, how long it waited and ran, and how long it would run on an idle server.
        self._recent: deque[tuple[float, float, float, float]] = deque(maxlen=_MOST_RECENT)

    def ran(
        self,
        requests: Sequence[tuple[float, float, str]],
        samples: int,
        decode_s: float,
        compute_s: float,
        encode_s: float,
    ) -> None:
        """Take notice of requests that ran together and were answered.

        Args:
            requests: of each of them, how long it waited, how long it takes on an idle server, and the names of its
                tensors as the log tells them.
            samples: how many samples they had together.
            decode_s: how long it took to read them.
            compute_s: how long the model ran.
            encode_s: how long it took to write the answers.
        """
        ended_s, count = time.perf_counter(), len(requests)
        run_s = decode_s + compute_s + encode_s
        with self._lock:
            self._requests += count
            self._samples += samples
            self._last_s = ended_s
            self.by_requests[count] = self.by_requests.get(count, 0) + 1
            runs = self._runs.get(samples)
            if runs is None:
                runs = self._runs[samples] = _Runs()
            runs.count += 1
            runs.decode_s += decode_s
            runs.compute_s += compute_s
            runs.encode_s += encode_s
            whole = self._whole
            whole.count += 1
            whole.decode_s += count * decode_s
            whole.compute_s += count * compute_s
            whole.encode_s += count * encode_s
            for wait_s, unloaded_s, cut in requests:
                self._queue_s += wait_s
                self._recent.append((ended_s, wait_s, run_s, unloaded_s))
                if cut not in self.cuts and len(self.cuts) >= MOST_CUTS:
                    cut = "other"
                self.cuts[cut] = self.cuts.get(cut, 0) + 1

    def failed(self, duration_s: float) -> None:
        """Take notice of a request that was not answered with the model's output."""
        with self._lock:
            self._failed += 1
            self._failed_s += duration_s

    @property
    def ended(self) -> int:
        """How many requests have ended, in whatever way."""
        return self._requests + self._failed

    def lately(self) -> dict[str, Any]:
        """Return what requests took in the last ten seconds, as ``/v2/load`` tells it."""
        now_s = time.perf_counter()
        with self._lock:
            recent = [one for one in self._recent if one[0] > now_s - LATELY_S]
            full = len(recent) == _MOST_RECENT
        over_s = now_s - recent[0][0] if full else min(LATELY_S, now_s - self._begun_s)
        taken_s = sorted(wait_s + run_s for _, wait_s, run_s, _ in recent)
        unloaded_s = sum(one[3] for one in recent)
        count = len(recent)
        return {
            "answers": count,
            "over_s": round(over_s, 3),
            "rate_s": round(count / over_s, 3) if over_s else 0.0,
            "queue_s": _rounded(sum(one[1] for one in recent) / count if count else 0.0),
            "compute_s": _rounded(sum(one[2] for one in recent) / count if count else 0.0),
            "unloaded_s": _rounded(unloaded_s / count if count else 0.0),
            "load_factor": round(sum(taken_s) / unloaded_s, 3) if unloaded_s else 1.0,
            "latency_s": {f"p{rank}": _percentile(taken_s, rank) for rank in (50, 90, 99)},
        }

    def as_triton(self, name: str, version: str) -> dict[str, Any]:
        """Return what Triton's statistics extension tells of a model: counts, and nanoseconds."""
        with self._lock:
            whole, count = self._whole, self._requests
            taken_s = self._queue_s + whole.decode_s + whole.compute_s + whole.encode_s
            age_s = time.perf_counter() - self._last_s
            return {
                "name": name,
                "version": version,
                "last_inference": round((time.time() - age_s) * 1e3) if count else 0,
                "inference_count": self._samples,
                "execution_count": whole.count,
                "inference_stats": {
                    "success": _duration(count, taken_s),
                    "fail": _duration(self._failed, self._failed_s),
                    "queue": _duration(count, self._queue_s),
                    "compute_input": _duration(count, whole.decode_s),
                    "compute_infer": _duration(count, whole.compute_s),
                    "compute_output": _duration(count, whole.encode_s),
                    "cache_hit": _duration(0, 0.0),
                    "cache_miss": _duration(0, 0.0),
                },
                "batch_stats": [
                    {
                        "batch_size": size,
                        "compute_input": _duration(runs.count, runs.decode_s),
                        "compute_infer": _duration(runs.count, runs.compute_s),
                        "compute_output": _duration(runs.count, runs.encode_s),
                    }
                    for size, runs in sorted(self._runs.items())
                ],
            }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


def _percentile(ordered: Sequence[float], rank: int) -> float | None:
    """Return the smallest of the values that so many percent are not above; None where there is none."""
    return _rounded(ordered[math.ceil(len(ordered) * rank / 100) - 1]) if ordered else None
