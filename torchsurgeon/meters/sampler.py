"""Reads an energy meter in the background while something else runs."""

from __future__ import annotations

import threading
from types import TracebackType

from torchsurgeon.errors import MeterError
from torchsurgeon.meters.energy import EnergyMeter, NullMeter, Reading
from torchsurgeon.meters.trace import EnergyTrace

_MAX_FAULTS = 100


class EnergySampler:
    """Reads a meter periodically in a thread, from entering to leaving the context.

        idle_w = measure_idle(meter)
        with EnergySampler(meter) as sampler:
            spans = [run() for _ in range(100)]          # (start_ns, end_ns) of time.perf_counter_ns
        cost = sampler.trace().estimate(spans, idle_w)

    A reading that fails is skipped, so energy is unknown around it. A ``NullMeter`` is not read at all.

    Args:
        meter: the meter.
        period_s: seconds between two readings; the meter's own by default.

    Attributes:
        readings: what was read so far.
        faults: the errors of the first 100 readings that failed.
    """

    def __init__(self, meter: EnergyMeter, period_s: float | None = None) -> None:
        self.meter = meter
        self.period_s = meter.period_s if period_s is None else period_s
        self.readings: list[Reading] = []
        self.faults: list[MeterError] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def trace(self) -> EnergyTrace:
        """Return what was read so far, integrated over time."""
        return EnergyTrace(self.readings)

    def __enter__(self) -> EnergySampler:
        if not isinstance(self.meter, NullMeter):
            self._stop.clear()
            self._read()
            self._thread = threading.Thread(target=self._run, name="torchsurgeon-energy", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self._read()

    def _run(self) -> None:
        while not self._stop.wait(self.period_s):
            self._read()

    def _read(self) -> None:
        try:
            self.readings.append(self.meter.read())
        except MeterError as error:
            if len(self.faults) < _MAX_FAULTS:
                self.faults.append(error)


def measure_idle(meter: EnergyMeter, duration_s: float = 1.0) -> float | None:
    """Return the mean power in watts while this process only waits; None where nothing is metered.

    Args:
        meter: the meter.
        duration_s: how long to wait.
    """
    with EnergySampler(meter) as sampler:
        threading.Event().wait(duration_s)
    return sampler.trace().mean_power_w()
