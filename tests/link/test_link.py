from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchsurgeon.errors import LinkError
from torchsurgeon.link import PRESETS, WIRED, BandwidthTrace, Link, Radio, TracedLink, parse_profile


@pytest.mark.parametrize(
    ("name", "up_mbit_s", "down_mbit_s"), [("3g", 1.1, 2.03), ("lte", 5.85, 13.76), ("wifi", 18.88, 54.97)]
)
def test_presets_have_the_rates_of_the_paper(name: str, up_mbit_s: float, down_mbit_s: float) -> None:
    link = Link.parse(name.upper())
    assert link is PRESETS[name]
    assert (link.uplink_bit_s, link.downlink_bit_s) == pytest.approx((up_mbit_s * 1e6, down_mbit_s * 1e6))
    assert link.source


@pytest.mark.parametrize("text", ["5.85/13.76/0.07", " 5.85 / 13.76 / 70ms ", "5.85/13.76/0.07s"])
def test_a_link_is_written_in_mbit_s_and_seconds(text: str) -> None:
    link = Link.parse(text)
    assert (link.uplink_bit_s, link.downlink_bit_s, link.round_trip_s) == pytest.approx((5.85e6, 13.76e6, 0.07))


def test_a_request_takes_both_transfers_and_one_round_trip() -> None:
    link = Link("l", 8e6, 16e6, 0.05)
    assert link.uplink_s(1_000_000) == pytest.approx(1.0)
    assert link.downlink_s(1_000_000) == pytest.approx(0.5)
    assert link.request_s(1_000_000, 2_000_000) == pytest.approx(2.05)
    assert link.request_s(0, 0) == 0.05


def test_another_uplink_rate_takes_the_downlink_along_as_far_as_rates_may_go() -> None:
    link = Link("asymmetric", 1e9, 1e6, 0.0)
    assert link.with_uplink(1e8).downlink_bit_s == pytest.approx(1e5)
    assert link.with_uplink(1e3).downlink_bit_s == 1e3
    assert Link("asymmetric", 1e3, 1e9, 0.0).with_uplink(1e9).downlink_bit_s == 1e12


@pytest.mark.parametrize("bit_s", [0, -1.0, math.nan, math.inf, 5.85, 1e13])
def test_impossible_rates_are_refused(bit_s: float) -> None:
    with pytest.raises(LinkError, match="uplink"):
        Link("l", bit_s, 1e6, 0.1)
    with pytest.raises(LinkError, match="downlink"):
        Link("l", 1e6, bit_s, 0.1)


def test_a_rate_given_in_mbit_s_is_told_how_to_write_it() -> None:
    with pytest.raises(LinkError, match=r"5\.85e6"):
        Link("l", 5.85, 1e6, 0.1)


@pytest.mark.parametrize("round_trip_s", [-0.1, math.nan, math.inf, 70.0])
def test_impossible_round_trips_are_refused(round_trip_s: float) -> None:
    with pytest.raises(LinkError, match="round-trip"):
        Link("l", 1e6, 1e6, round_trip_s)


@pytest.mark.parametrize("size_bytes", [-1, math.nan])
def test_impossible_sizes_are_refused(size_bytes: float) -> None:
    with pytest.raises(LinkError, match="bytes"):
        PRESETS["lte"].uplink_s(size_bytes)


@pytest.mark.parametrize("text", ["", "5g", "1/2", "1/2/3/4", "a/2/0.1", "1/2/soon", "0/1/0.1", "1/nan/0.1", "1/2/-1"])
def test_texts_that_are_no_link_are_refused(text: str) -> None:
    with pytest.raises(LinkError):
        Link.parse(text)


def test_a_long_round_trip_needs_its_unit(tmp_path: Path) -> None:
    for text in ("10/5/60", f"trace:{write(tmp_path, 'one')},60"):
        with pytest.raises(LinkError, match=r"a round trip is in seconds; got 60 in .*; write 60ms, or 60s if"):
            parse_profile(text)
    assert Link.parse("10/5/60s").round_trip_s == 60
    assert Link.parse("10/5/10").round_trip_s == 10
    with pytest.raises(LinkError, match="round-trip"):
        Link.parse("10/5/70s")


def test_an_unknown_link_lists_the_known_ones() -> None:
    with pytest.raises(LinkError, match="3g, lte, wifi"):
        parse_profile("ltee")


def write(tmp_path: Path, text: str, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_mahimahi_line_delivers_1500_bytes_at_its_millisecond_and_repeats(tmp_path: Path) -> None:
    trace = BandwidthTrace.read(write(tmp_path, "10\n10\n500\n1000\n"))
    assert trace.duration_s == 1.0
    assert trace.mean_bit_s == 4 * 12000
    assert trace.bits_available(0, 0.010) == pytest.approx(24000)
    assert trace.bits_available(0.010, 0.499) == 0
    assert trace.bits_available(0.25, 3.25) == pytest.approx(3 * 48000)
    assert trace.delivered_at(0, 3000) == pytest.approx(0.010)
    assert trace.delivered_at(0, 3001) == pytest.approx(0.5, abs=0.001)
    assert trace.delivered_at(0.6, 1500) == pytest.approx(1.0)
    assert trace.delivered_at(0.6, 3 * 1500) == pytest.approx(1.010)


def test_chunks_that_end_at_an_outage_do_not_wait_for_its_end(tmp_path: Path) -> None:
    opportunities = "".join(f"{ms}\n" for ms in [*range(1, 101), 900])
    trace = BandwidthTrace.read(write(tmp_path, opportunities))
    at_s = 0.0
    for _ in range(100):
        at_s = trace.delivered_at(at_s, 1500)
    assert at_s == pytest.approx(0.1, abs=1e-6)
    assert trace.delivered_at(at_s, 1500) == pytest.approx(0.9)


def test_a_trace_with_a_long_pause_says_how_long_it_is(tmp_path: Path) -> None:
    path = tmp_path / "paused.trace"
    path.write_text("1\n90000000\n")
    with pytest.raises(LinkError, match=r"mean rate must be .*; got 0.2\d* over 90000 s, .* pause takes 90000 s"):
        BandwidthTrace.read(path)


def test_seconds_and_mbit_s_hold_from_their_line_on(tmp_path: Path) -> None:
    trace = BandwidthTrace.read(write(tmp_path, "# recorded at noon\n100 8\n\n101.5 0\n102 4\n"))
    assert trace.duration_s == pytest.approx(2.5)
    assert trace.bits_available(0, 1.5) == pytest.approx(12e6)
    assert trace.bits_available(1.5, 2.0) == 0
    assert trace.bits_available(2.0, 2.5) == pytest.approx(2e6)
    assert trace.delivered_at(1.0, 500_000 + 125_000) == pytest.approx(2.25)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1\n2\nthree\n", 3),
        ("1\n2.5\n", 2),
        ("5\n\n4\n", 3),
        ("-1\n2\n", 1),
        ("0\n0\n", 2),
        ("1\n2 3\n", 2),
        ("1 2 3\n", 1),
        ("0 1\n0 2\n", 2),
        ("0 1\n1 nan\n", 2),
        ("0 1\n1 -3\n", 2),
    ],
)
def test_a_malformed_trace_is_refused_by_file_and_line(tmp_path: Path, text: str, line: int) -> None:
    path = write(tmp_path, text)
    with pytest.raises(LinkError, match=rf"{path}:{line}:"):
        BandwidthTrace.read(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# only words\n", b"\xff\xfe\x00", b"0 0\n1 0\n"])
def test_a_trace_without_content_is_refused_by_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(LinkError, match=str(path)):
        BandwidthTrace.read(path)


def test_a_missing_trace_is_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="nowhere"):
        BandwidthTrace.read(tmp_path / "nowhere")


rates = st.lists(st.sampled_from([0.0, 1e5, 3e6, 2e7]), min_size=2, max_size=8).filter(any)


@given(rates, st.floats(0, 30), st.integers(1, 300_000))
@settings(deadline=None)
def test_the_bits_available_until_a_delivery_are_the_bits_delivered(
    per_second: list[float], start_s: float, size_bytes: int
) -> None:
    times = np.arange(len(per_second) + 1, dtype=np.float64)
    trace = BandwidthTrace(times, np.append(0.0, np.cumsum(per_second)))
    end_s = trace.delivered_at(start_s, size_bytes)
    assert trace.bits_available(start_s, end_s) == pytest.approx(size_bytes * 8, abs=0.1)
    halfway_s = trace.delivered_at(start_s, size_bytes / 2)
    assert trace.delivered_at(halfway_s, size_bytes / 2) == pytest.approx(end_s, abs=1e-6)


def test_a_synthetic_trace_has_the_statistics_of_a_measured_lte_uplink() -> None:
    trace = BandwidthTrace.synthetic(5.95e6)
    assert trace.mean_bit_s == pytest.approx(5.95e6)
    rates_bit_s = trace.rates_bit_s(1.0)
    assert len(rates_bit_s) == 140
    assert np.percentile(rates_bit_s, [10, 50, 90]) == pytest.approx([2.4e6, 5.7e6, 10.6e6], rel=0.12)
    around = rates_bit_s - rates_bit_s.mean()
    assert 0.5 < (around[1:] * around[:-1]).sum() / (around**2).sum() < 0.95


def test_a_synthetic_trace_is_the_same_for_the_same_seed() -> None:
    first, again, other = (BandwidthTrace.synthetic(1e6, seed=seed).rates_bit_s() for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("arguments", [{"duration_s": 1}, {"duration_s": math.nan}, {"correlation_s": -1}])
def test_impossible_synthetic_traces_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(LinkError):
        BandwidthTrace.synthetic(1e6, **arguments)  # type: ignore[arg-type]


def test_a_profile_of_traces_has_one_for_each_direction_and_a_round_trip(tmp_path: Path) -> None:
    up = write(tmp_path, "0 1\n1 1\n", "up")
    down = write(tmp_path, "0 9\n1 9\n", "down")
    both = parse_profile(f"trace:{up},{down},60ms")
    assert isinstance(both, TracedLink)
    assert (both.uplink.mean_bit_s, both.downlink.mean_bit_s, both.round_trip_s) == pytest.approx((1e6, 9e6, 0.06))
    one = parse_profile(f"trace:{up}")
    assert isinstance(one, TracedLink)
    assert one.uplink is one.downlink
    assert one.round_trip_s == 0


@pytest.mark.parametrize("text", ["trace:", "trace:a,b,c", "trace:,a", "trace:/nowhere/up"])
def test_profiles_of_no_trace_are_refused(text: str) -> None:
    with pytest.raises(LinkError):
        parse_profile(text)


def test_a_profile_may_be_any_link() -> None:
    assert parse_profile("lte") is PRESETS["lte"]
    assert parse_profile("1/2/0.1") == Link("1/2/0.1", 1e6, 2e6, 0.1)


@pytest.mark.parametrize(
    ("name", "up_mw_per_mbit_s", "down_mw_per_mbit_s", "base_mw"),
    [("3g", 868.98, 122.12, 817.88), ("lte", 438.39, 51.97, 1288.04), ("wifi", 283.17, 137.01, 132.86)],
)
def test_radios_have_the_power_of_the_paper(
    name: str, up_mw_per_mbit_s: float, down_mw_per_mbit_s: float, base_mw: float
) -> None:
    radio = PRESETS[name].radio
    assert radio is not None
    assert radio.source
    assert radio.sending_w(2e6) * 1e3 == pytest.approx(2 * up_mw_per_mbit_s + base_mw)
    assert radio.receiving_w(3e6) * 1e3 == pytest.approx(3 * down_mw_per_mbit_s + base_mw)


@pytest.mark.parametrize(("name", "mw_per_mbit_s"), [("lte-2021", 80.21), ("5g-low", 29.15), ("5g-mmwave", 9.42)])
def test_radios_of_today_take_less_to_send(name: str, mw_per_mbit_s: float) -> None:
    link = Link.parse(name)
    assert link.radio is not None
    assert "lower bound" in link.radio.source
    assert link.request_j(1e6, 1e6) == pytest.approx(8e6 * mw_per_mbit_s * 1e-9)


def test_a_request_takes_the_power_of_both_transfers_and_one_tail() -> None:
    lte = PRESETS["lte"]
    up_s, down_s = lte.uplink_s(1e6), lte.downlink_s(2e6)
    active_j = up_s * (0.43839 * 5.85 + 1.28804) + down_s * (0.05197 * 13.76 + 1.28804)
    assert lte.request_j(1e6, 2e6) == pytest.approx(active_j + 11.6 * 1.060)
    assert lte.back_to_back().request_j(1e6, 2e6) == pytest.approx(active_j)
    assert Link("cable", 1e6, 1e6, 0.0, radio=WIRED).request_j(1e6, 1e6) == 0
    with pytest.raises(LinkError, match="radio"):
        Link("unknown", 1e6, 1e6, 0.0).request_j(1, 1)


@pytest.mark.parametrize("watts", [-1.0, math.nan, math.inf])
def test_powers_that_cannot_be_are_refused(watts: float) -> None:
    with pytest.raises(LinkError, match="radio"):
        Radio(0.0, 0.0, watts)


def test_a_fresh_connection_waits_for_acknowledgements_until_the_link_is_full() -> None:
    link = Link("l", 8e6, 8e6, 0.1)  # 100 kB are on the way at full rate
    assert link.request_s(0, 0, fresh=True) == pytest.approx(0.2)
    assert link.request_s(14_600, 0, fresh=True) == pytest.approx(0.2 + 0.0146)
    # Rounds of 14.6, 29.2 and 58.4 kB are shorter than the round trip; the fourth fills the link.
    slow_s = sum(0.1 - size / 1e6 for size in (14_600, 29_200, 58_400))
    assert link.request_s(1e6, 0, fresh=True) == pytest.approx(0.2 + 1.0 + slow_s)
    assert link.request_s(0, 1e6, fresh=True) == pytest.approx(0.2 + 1.0 + slow_s)
    near = Link("near", 8e6, 8e6, 0.001)
    assert near.request_s(1e6, 0, fresh=True) == pytest.approx(near.request_s(1e6, 0) + 0.001)
