"""A link of constant rates: how long a transfer takes, and how much energy the device's radio takes for it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from torchsurgeon.errors import LinkError, is_finite, short

LEAST_BIT_S, MOST_BIT_S = 1e3, 1e12
_MOST_ROUND_TRIP_S = 60.0
# In a link's text.
_LONGEST_WITHOUT_UNIT_S = 10.0
# What a new TCP connection may send before the first acknowledgement (RFC 6928).
_INITIAL_WINDOW_BYTES = 10 * 1460


def checked_rate(what: str, bit_s: float) -> None:
    """Check that a rate is positive, and so large or small that its unit is bits per second.

    Args:
        what: what the rate is of, as the message names it ("an uplink's rate").
        bit_s: the rate, 1e3 to 1e12 bit/s.

    Raises:
        LinkError: it is not.
    """
    if not is_finite(bit_s) or bit_s <= 0:
        raise LinkError(f"{what} must be a positive number of bits per second; got {short(bit_s)}")
    if bit_s < LEAST_BIT_S:
        raise LinkError(
            f"{what} must be at least {LEAST_BIT_S:g} bit/s; got {bit_s:g}; for {bit_s:g} Mbit/s give {bit_s:g}e6"
        )
    if bit_s > MOST_BIT_S:
        raise LinkError(f"{what} must be at most {MOST_BIT_S:g} bit/s; got {bit_s:g}; the unit is bits per second")


def checked_round_trip(round_trip_s: float) -> None:
    """Check that a round-trip time is one.

    Args:
        round_trip_s: the time, 0 to 60 s.

    Raises:
        LinkError: it is not.
    """
    if not is_finite(round_trip_s) or round_trip_s < 0:
        raise LinkError(f"a round-trip time must be zero or more seconds; got {short(round_trip_s)}")
    if round_trip_s > _MOST_ROUND_TRIP_S:
        raise LinkError(
            f"a round-trip time must be at most {_MOST_ROUND_TRIP_S:g} s; got {round_trip_s:g}; "
            f"for {round_trip_s:g} ms give {round_trip_s / 1e3:g}"
        )


def checked_size(size_bytes: float) -> None:
    """Check that a transfer has a size.

    Args:
        size_bytes: its bytes, 0 or more.

    Raises:
        LinkError: it is negative or not finite.
    """
    if not is_finite(size_bytes) or size_bytes < 0:
        raise LinkError(f"a transfer must have zero or more bytes; got {short(size_bytes)}")


@dataclass(frozen=True)
class Radio:
    """The power of a device's radio.

    While it transfers, a base power plus one that is proportional to the rate; after the last byte, a constant power
    for as long as it stays awake (its tail).

    Attributes:
        up_w_per_bit_s: watts for each bit per second that is sent.
        down_w_per_bit_s: watts for each bit per second that is received.
        base_w: watts while anything is sent or received.
        tail_s: seconds that the radio stays awake after a transfer.
        tail_w: watts meanwhile.
        source: where the figures come from.

    Raises:
        LinkError: a value is negative or not finite.
    """

    up_w_per_bit_s: float
    down_w_per_bit_s: float
    base_w: float
    tail_s: float = 0.0
    tail_w: float = 0.0
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("up_w_per_bit_s", "down_w_per_bit_s", "base_w", "tail_s", "tail_w"):
            value = getattr(self, name)
            if not is_finite(value) or value < 0:
                raise LinkError(f"a radio's {name} must be zero or more; got {short(value)}")

    def sending_w(self, bit_s: float) -> float:
        """Return the watts while sending at a rate in bit/s."""
        return self.up_w_per_bit_s * bit_s + self.base_w

    def receiving_w(self, bit_s: float) -> float:
        """Return the watts while receiving at a rate in bit/s."""
        return self.down_w_per_bit_s * bit_s + self.base_w

    @property
    def tail_j(self) -> float:
        """Joules that the radio takes for staying awake after a transfer."""
        return self.tail_s * self.tail_w


@dataclass(frozen=True)
class Link:
    """A link of constant rates between a device and its server.

    Attributes:
        name: the link's name.
        uplink_bit_s: payload rate from device to server, 1e3 to 1e12 bit/s.
        downlink_bit_s: payload rate from server to device, 1e3 to 1e12 bit/s.
        round_trip_s: seconds between sending an empty message and receiving its answer, 0 to 60.
        source: where the figures come from.
        radio: the power of the device's radio; None where it is not known.

    Raises:
        LinkError: a value is out of its range.
    """

    name: str
    uplink_bit_s: float
    downlink_bit_s: float
    round_trip_s: float
    source: str = field(default="", compare=False)
    radio: Radio | None = None

    def __post_init__(self) -> None:
        up, down, trip_s = self.uplink_bit_s, self.downlink_bit_s, self.round_trip_s
        if type(up) is type(down) is type(trip_s) is float and (
            LEAST_BIT_S <= up <= MOST_BIT_S and LEAST_BIT_S <= down <= MOST_BIT_S and 0 <= trip_s <= _MOST_ROUND_TRIP_S
        ):
            return  # Estimates are made a link before every call, so the usual case is settled at once.
        checked_rate("an uplink's rate", self.uplink_bit_s)
        checked_rate("a downlink's rate", self.downlink_bit_s)
        checked_round_trip(self.round_trip_s)

    def __str__(self) -> str:
        up, down = self.uplink_bit_s / 1e6, self.downlink_bit_s / 1e6
        return f"{self.name}: {up:g} Mbit/s up, {down:g} Mbit/s down, {self.round_trip_s * 1e3:g} ms round trip"

    def uplink_s(self, size_bytes: float) -> float:
        """Return the seconds that a transfer occupies the uplink, without the delay until it arrives.

        Args:
            size_bytes: its bytes.

        Raises:
            LinkError: they are negative or not finite.
        """
        checked_size(size_bytes)
        return size_bytes * 8 / self.uplink_bit_s

    def with_uplink(self, uplink_bit_s: float) -> Link:
        """Return the link at another uplink rate. Its downlink keeps its ratio to the uplink, as far as rates may go.

        Args:
            uplink_bit_s: the uplink's rate, 1e3 to 1e12 bit/s.

        Raises:
            LinkError: the rate is not within these.
        """
        checked_rate("an uplink's rate", uplink_bit_s)
        downlink_bit_s = uplink_bit_s * (self.downlink_bit_s / self.uplink_bit_s)
        within = min(max(downlink_bit_s, LEAST_BIT_S), MOST_BIT_S)
        return replace(self, uplink_bit_s=uplink_bit_s, downlink_bit_s=within)

    def downlink_s(self, size_bytes: float) -> float:
        """Return the seconds that a transfer occupies the downlink, without the delay until it arrives.

        Args:
            size_bytes: its bytes.

        Raises:
            LinkError: they are negative or not finite.
        """
        checked_size(size_bytes)
        return size_bytes * 8 / self.downlink_bit_s

    def request_s(self, up_bytes: float, down_bytes: float, *, fresh: bool = False) -> float:
        """Return the seconds that a request and its answer spend on the link: both transfers and one round trip.

        Args:
            up_bytes: bytes of the request.
            down_bytes: bytes of the answer.
            fresh: whether the connection is new. A new one takes another round trip to open, and starts slowly in both
                directions: 10 segments of 1460 bytes (RFC 6928), twice as many after each round trip (RFC 5681), until
                they fill the link.

        Raises:
            LinkError: a size is negative or not finite.
        """
        on_the_way_s = self.uplink_s(up_bytes) + self.round_trip_s + self.downlink_s(down_bytes)
        if not fresh:
            return on_the_way_s
        slow_s = self._slow_start_s(up_bytes, self.uplink_bit_s) + self._slow_start_s(down_bytes, self.downlink_bit_s)
        return on_the_way_s + self.round_trip_s + slow_s

    def _slow_start_s(self, size_bytes: float, bit_s: float) -> float:
        """Return the seconds in which a new connection waits for acknowledgements instead of sending."""
        window_bytes, waited_s = float(_INITIAL_WINDOW_BYTES), 0.0
        while window_bytes < min(size_bytes, bit_s * self.round_trip_s / 8):
            waited_s += self.round_trip_s - window_bytes * 8 / bit_s
            size_bytes -= window_bytes
            window_bytes *= 2
        return waited_s

    def request_j(self, up_bytes: float, down_bytes: float) -> float:
        """Return the joules that the device's radio takes for a request and its answer, and for its tail.

        Args:
            up_bytes: bytes of the request.
            down_bytes: bytes of the answer.

        Raises:
            LinkError: the power of the radio is not known, or a size is negative or not finite.
        """
        radio = self.radio
        if radio is None:
            raise LinkError(
                f"the power of the radio on the link {short(self.name, 100)} is not known: give Link(…, "
                "radio=Radio(…)), or radio=torchsurgeon.link.WIRED where no radio is in use"
            )
        up_s, down_s = self.uplink_s(up_bytes), self.downlink_s(down_bytes)
        return (
            radio.sending_w(self.uplink_bit_s) * up_s + radio.receiving_w(self.downlink_bit_s) * down_s + radio.tail_j
        )

    def back_to_back(self) -> Link:
        """Return this link for requests that follow each other so closely that the radio has no tail between them."""
        return self if self.radio is None else replace(self, radio=replace(self.radio, tail_s=0.0))

    @staticmethod
    def parse(text: str) -> Link:
        """Return the link that a text names.

        Args:
            text: the name of a preset ("lte"), or up/down/round-trip in Mbit/s and seconds or milliseconds
                ("5.85/13.76/0.06", "5.85/13.76/60ms").

        Raises:
            LinkError: it is neither, or a value is out of its range.
        """
        if not isinstance(text, str):
            raise LinkError(f'a link must be written as text, such as "lte" or "5.85/13.76/0.06"; got {short(text)}')
        name = text.strip().lower()
        if name in PRESETS:
            return PRESETS[name]
        parts = name.split("/")
        if len(parts) != 3:
            raise LinkError(
                f"there is no link {short(text)}: use one of {', '.join(PRESETS)}, "
                "or up/down/round-trip in Mbit/s and seconds, such as 5.85/13.76/0.06"
            )
        up, down = (_number(part, "Mbit/s", text) for part in parts[:2])
        return Link(text.strip(), up * 1e6, down * 1e6, seconds_of(parts[2], text))


def _number(part: str, unit: str, text: str) -> float:
    try:
        return float(part)
    except ValueError:
        raise LinkError(
            f"a link must hold numbers of {unit}; got {short(part.strip(), 100)} in {short(text, 150)}"
        ) from None


def seconds_of(part: str, text: str) -> float:
    """Return the seconds that a part of a link's text means.

    Args:
        part: the part: a number of seconds, or one followed by "s" or "ms".
        text: the whole text, for the message.

    Raises:
        LinkError: it holds no number, or one above 10 without a unit, which is most likely in milliseconds.
    """
    number, unit = re.fullmatch(r"\s*(.*?)\s*(ms|s)?\s*", part, re.DOTALL).groups()  # type: ignore[union-attr]
    value = _number(number, "seconds", text)
    if unit is None and _LONGEST_WITHOUT_UNIT_S < value <= _MOST_ROUND_TRIP_S * 1e3:
        raise LinkError(
            f"a round trip is in seconds; got {value:g} in {short(text, 150)}; write {value:g}ms, or {value:g}s if "
            "seconds are meant"
        )
    return value * (1e-3 if unit == "ms" else 1.0)


# Milliwatts per Mbit/s, as papers give them, in watts per bit/s.
_MW_PER_MBIT_S = 1e-9
_RATES = "rates: US averages of TestMyNet as used by Kang et al., Neurosurgeon, ASPLOS 2017"
_HUANG = "Huang et al., A Close Examination of Performance and Power Characteristics of 4G LTE Networks, MobiSys 2012"
_NARAYANAN = "Narayanan et al., A Variegated Look at 5G in the Wild, SIGCOMM 2021"
_UPLINK_ONLY = (
    f"{_NARAYANAN}: sending only; base, receiving and tail are counted as zero, so energies are a lower bound"
)
_ROUND_FIGURES = "rates and round trip: round figures for orientation, not measured averages; give your own"

WIRED = Radio(0.0, 0.0, 0.0, source="no radio")
"""The radio of a link without one: transfers take no energy that counts."""

PRESETS: dict[str, Link] = {
    link.name: link
    for link in (
        Link(
            "3g",
            1.1e6,
            2.03e6,
            0.200,
            f"{_RATES}; round trip: typical, inside the 100-500 ms of Grigorik, High Performance Browser Networking, "
            "table 7-2",
            Radio(868.98 * _MW_PER_MBIT_S, 122.12 * _MW_PER_MBIT_S, 0.81788, source=f"{_HUANG}; no tail counted"),
        ),
        Link(
            "lte",
            5.85e6,
            13.76e6,
            0.060,
            f"{_RATES}; round trip: averages of 57-65 ms, OpenSignal, State of Mobile Networks: USA, August 2016",
            Radio(438.39 * _MW_PER_MBIT_S, 51.97 * _MW_PER_MBIT_S, 1.28804, 11.6, 1.060, source=_HUANG),
        ),
        Link(
            "wifi",
            18.88e6,
            54.97e6,
            0.020,
            f"{_RATES}; round trip: typical, the median home access of 21 ms in Daoudi, Web Performance Calendar 2013",
            Radio(283.17 * _MW_PER_MBIT_S, 137.01 * _MW_PER_MBIT_S, 0.13286, source=f"{_HUANG}; no tail counted"),
        ),
        Link(
            "lte-2021",
            5.85e6,
            13.76e6,
            0.060,
            f"{_RATES}; round trip: as for lte",
            Radio(80.21 * _MW_PER_MBIT_S, 0.0, 0.0, source=_UPLINK_ONLY),
        ),
        Link(
            "5g-low", 20e6, 100e6, 0.030, _ROUND_FIGURES, Radio(29.15 * _MW_PER_MBIT_S, 0.0, 0.0, source=_UPLINK_ONLY)
        ),
        Link(
            "5g-mmwave",
            100e6,
            1000e6,
            0.015,
            _ROUND_FIGURES,
            Radio(9.42 * _MW_PER_MBIT_S, 0.0, 0.0, source=_UPLINK_ONLY),
        ),
    )
}
"""By name, the wireless links of the Neurosurgeon paper and today's; each link's and radio's ``source`` says where its
figures come from."""
