"""The tables of docs/simulation.md, from what benchmarks.evaluate.datacenter found.

python -m benchmarks.evaluate.datacenter_page   # writes them into the page
"""

from __future__ import annotations

import json
import textwrap
from typing import Any

from benchmarks.evaluate.applications import APPLICATIONS, DEVICES
from benchmarks.evaluate.datacenter_picture import LINK_NAMES
from benchmarks.support import result_file

RESULTS = result_file.RESULTS / "evaluation" / "datacenter.json"
PAGE = result_file.RESULTS.parents[1] / "docs" / "simulation.md"
BEGIN, END = "<!-- figures, by benchmarks.evaluate.datacenter_page -->", "<!-- end of figures -->"
_RIVALS = ("status quo", "device-only", "ours")


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    results = json.loads(RESULTS.read_text())["results"]
    PAGE.write_text(f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{rest.partition(END)[2]}")
    print(f"written to {PAGE}")


def section(results: dict[str, Any]) -> str:
    """Return everything that the benchmark found, as Markdown without headings.

    Args:
        results: the results in the benchmark's file.
    """
    simulated = results["simulated"]
    second = list(results["tables"])[-1]
    fluid = results["fluid"]
    parts = [
        _paragraph(
            "**Highest rate of inferences, as a multiple of the status quo's** "
            f"(simulated, {simulated['servers']} servers; {simulated['percentile']:g} % of the queries that reach them "
            f"wait at most {1e3 * simulated['limit_s']:g} ms; 95 % intervals over {simulated['replications']} "
            f"replications of {simulated['queries']:,} queries). “Any” means that every application runs on the "
            "device, so that no query reaches a server."
        )
    ]
    for name, rows in results["tables"].items():
        parts += [f"{name[0].upper()}{name[1:]}:", _gains(rows, results["published"])]
    parts += [
        _paragraph(
            f"**Where the planner cuts** (computed from measured layers; {second}). “Server” and “device” stand for "
            "running all of it there."
        ),
        _cuts(results["choices"][second]),
        _paragraph(
            f"**What users get while servers are idle** ({second}; 30 % of the devices with a GPU): mean latency, and "
            "mean energy of the device with its radio (computed)."
        ),
        _rivals(results["tables"][second]),
        _paragraph(
            "**Under other assumptions** (simulated; gain over the status quo, with 30 % of the devices having a GPU). "
            "Each line changes one assumption of the second table."
        ),
        _others(results["others"]),
        "**The simulator beside closed forms** (mean wait, in mean service times):",
        _validation(results),
        _paragraph(
            f"Seconds for a million queries to {results['speed']['servers']} servers on the machine of the file "
            f"(measured): {', '.join(f'{name} {taken:.2g}' for name, taken in results['speed']['seconds'].items())}."
        ),
        _paragraph(
            f"**{fluid['servers']:,} servers and {fluid['devices'] / 1e6:g} million devices** (fluid model, computed; "
            f"assumed: {fluid['assumed']}). Each cell says how busy the servers are, the factor by which they are "
            "slower than idle ones, and the mean latency."
        ),
        *_fluid(fluid),
    ]
    return "\n\n".join(parts)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _gains(rows: list[dict[str, Any]], published: dict[str, float]) -> str:
    shares = sorted({row["gpu_share"] for row in rows})
    lines = [_head("link", *(f"{100 * share:g} % with a GPU" for share in shares), "published")]
    for link, name in LINK_NAMES.items():
        cells = [
            _interval(row["gain"])
            for share in shares
            for row in rows
            if (row["link"], row["gpu_share"]) == (link, share)
        ]
        lines.append(_row(name, *cells, f"{published[link]:g}×"))
    return "\n".join(lines)


def _cuts(choices: list[dict[str, Any]]) -> str:
    words = {"input": "server", "all on the device": "device"}
    lines = [_head("link, device", *APPLICATIONS)]
    for link, name in LINK_NAMES.items():
        for kind in DEVICES:
            cuts = [row["cut"] for row in choices if (row["link"], row["device"]) == (link, kind)]
            lines.append(_row(f"{name}, {kind.upper()}", *(words.get(cut, f"after `{cut}`") for cut in cuts)))
    return "\n".join(lines)


def _rivals(rows: list[dict[str, Any]]) -> str:
    lines = [_head("link", *_RIVALS)]
    for row in rows:
        if row["gpu_share"] == 0.3:
            cells = [row["unloaded"][rival] for rival in _RIVALS]
            texts = [f"{1e3 * cell['latency_s']:.0f} ms, {cell['device_j']:.2f} J" for cell in cells]
            lines.append(_row(LINK_NAMES[row["link"]], *texts))
    return "\n".join(lines)


def _others(others: dict[str, Any]) -> str:
    lines = [_head("", *LINK_NAMES.values())]
    for name, rows in others.items():
        lines.append(_row(name, *(_interval(rows[link]["gain"]) for link in LINK_NAMES)))
    return "\n".join(lines)


def _validation(results: dict[str, Any]) -> str:
    lines = [_head("queue", "utilization", "simulated", "closed form")]
    for row in results["validation"]:
        exact = f"{row['closed_form']:.3g}"
        lines.append(_row(row["queue"], f"{row['utilization']:g}", _interval(row["simulated"], "", 3), exact))
    return "\n".join(lines)


def _fluid(fluid: dict[str, Any]) -> list[str]:
    rates = [f"{rate:g}" for rate in fluid["rates_per_device_s"]]
    settled = [_head("", *(f"{rate} inferences per second and device" for rate in rates))]
    bought = [
        _head("", f"servers for a load of {fluid['load']:g}", "USD", "kWh of servers", "kWh of devices", "mean latency")
    ]
    for name, row in fluid["table"].items():
        settled.append(_row(name, *(_settled(row["here"][rate]) for rate in rates)))
        cost = row["per_million"]
        bought.append(
            _row(
                name,
                f"{row['servers_for_load']:,}",
                f"{cost['usd']:.2f}",
                f"{cost['server_kwh']:.2f}",
                f"{cost['device_kwh']:.2f}",
                f"{1e3 * row['with_them']['latency_s']:.0f} ms",
            )
        )
    inputs = [_head("input", "value", "source")]
    inputs += [_row(f"`{name}`", f"{row['value']:,.10g}", row["source"]) for name, row in fluid["inputs"].items()]
    return [
        "\n".join(settled),
        _paragraph(
            f"**Per million inferences**, with servers bought for a load of {fluid['load']:g} at {rates[0]} inferences "
            "per second and device (computed):"
        ),
        "\n".join(bought),
        "Prices and powers that this rests on:",
        "\n".join(inputs),
    ]


def _settled(row: dict[str, Any]) -> str:
    if row["load"] is None:
        return f"asked for {row['utilization']:.1f} times what there is: overloaded"
    if not row["reaching"]:
        return f"nothing reaches them, {1e3 * row['latency_s']:.0f} ms"
    return f"{100 * row['utilization']:.0f} %, {row['load']:.1f}×, {1e3 * row['latency_s']:.0f} ms"


def _interval(estimate: dict[str, float] | None, unit: str = "×", digits: int = 3) -> str:
    if estimate is None:
        return "any"
    value, low, high = (f"{estimate[name]:.{digits}g}" for name in ("value", "low", "high"))
    return f"{value}{unit} ({low}–{high})"


def _head(*cells: str) -> str:
    return f"{_row(*cells)}\n{'|---' * len(cells)}|"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
