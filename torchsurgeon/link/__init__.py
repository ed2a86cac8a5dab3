"""The link between device and server: rates, the round trip, the radio's energy, and how rates change over time.

A ``Link`` has constant rates; a ``TracedLink`` follows one ``BandwidthTrace`` per direction. Rates are those of the
payload, as a bandwidth test reports them: the headers of the protocols below HTTP are not counted.
"""

from __future__ import annotations

from torchsurgeon.link.rates import PRESETS, WIRED, Link, Radio
from torchsurgeon.link.trace import MAHIMAHI_OPPORTUNITY_BYTES, BandwidthTrace, TracedLink, parse_profile

__all__ = [
    "MAHIMAHI_OPPORTUNITY_BYTES",
    "PRESETS",
    "WIRED",
    "BandwidthTrace",
    "Link",
    "Radio",
    "TracedLink",
    "parse_profile",
]
