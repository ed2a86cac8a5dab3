"""Figures that a script writes into a page are those of the files they are taken from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from benchmarks import (
    backend_accuracy,
    backend_answers,
    backend_prediction,
    backend_profiles,
    backends,
    codec_kinds,
    codec_rates,
    cost_page,
    csv_import,
    edge,
    edge_emulated,
    front_page,
    hostile_bytes,
    hostile_requests,
    planning_page,
    prediction_page,
    ray_latency,
    server_costs,
    server_load,
    server_memory,
    server_rivals,
    unlike_samples,
)
from benchmarks.coverage.page import page as coverage_page
from benchmarks.device import figures
from benchmarks.evaluate import configurations, datacenter_page, end_to_end
from benchmarks.evaluate import page as evaluation
from benchmarks.runtime import adapting
from benchmarks.support import result_file


def test_what_a_gpu_has_shown_is_what_its_files_hold() -> None:
    shown = figures.PAGE.read_text().partition(figures.BEGIN)[2].partition(figures.END)[0]
    assert shown == f"\n\n{figures.page()}\n"


def test_the_table_of_models_is_what_its_file_holds() -> None:
    results = ROOT / "benchmarks" / "results" / "coverage.json"
    assert (ROOT / "docs" / "coverage.md").read_text() == coverage_page(json.loads(results.read_text()))


def test_errors_of_predictions_are_those_of_their_file() -> None:
    runs = json.loads(prediction_page.OUT.read_text())["runs"]
    shown = prediction_page.PAGE.read_text().partition(prediction_page.BEGIN)[2].partition(prediction_page.END)[0]
    assert shown == f"\n\n{prediction_page.section(runs)}\n\n"
    assert len(runs) == 3


def test_a_device_on_arm_is_the_one_of_its_file_and_encodes_the_same_bytes() -> None:
    results = result_file.known(edge_emulated.OUT)
    shown = result_file.shown(edge_emulated.PAGE, edge_emulated.BEGIN, edge_emulated.END)
    assert shown == edge_emulated.section(results)
    for row in results["rows"]:
        assert all(row["same_bytes"].values())
        assert row["told"]["machine"] == "aarch64"
        assert max(row["deviation"][f"{where} raw"] for where in ("device", "server", "split")) < 1e-5
    assert results["installed_bytes"] <= 200e6


def test_predictions_of_backends_are_those_of_their_file() -> None:
    results = result_file.known(backend_prediction.OUT)
    shown = result_file.shown(backend_prediction.PAGE, backend_prediction.BEGIN, backend_prediction.END)
    assert shown == backend_prediction.table(results) + "\n"


def test_profiles_of_backends_are_those_of_their_file() -> None:
    rows = json.loads(backend_profiles.OUT.read_text())["results"]
    shown = backend_profiles.PAGE.read_text().partition(backend_profiles.BEGIN)[2].partition(backend_profiles.END)[0]
    assert shown == f"\n\n{backend_profiles.table(rows)}\n\n"


def test_layers_unlike_the_samples_are_those_of_their_file_and_none_is_wrong_in_silence() -> None:
    results = json.loads(unlike_samples.OUT.read_text())["results"]
    shown = unlike_samples.PAGE.read_text().partition(unlike_samples.BEGIN)[2].partition(unlike_samples.END)[0]
    assert shown == f"\n\n{unlike_samples.table(results)}\n\n"
    assert len(results) >= 40
    assert [name for name, row in results.items() if not (row["inside"] or row["warned"])] == []


def test_the_datacenter_is_the_one_of_its_file_and_agrees_with_queueing_theory() -> None:
    results = json.loads(datacenter_page.RESULTS.read_text())["results"]
    shown = datacenter_page.PAGE.read_text().partition(datacenter_page.BEGIN)[2].partition(datacenter_page.END)[0]
    assert shown == f"\n\n{datacenter_page.section(results)}\n\n"
    assert not results["quick"], "write the page from a full run"
    assert all(row["within"] for row in results["validation"])
    rows = [row for table in results["tables"].values() for row in table if row["gpu_share"] == 0.3]
    for row in rows:
        ours, device_only = row["unloaded"]["ours"], row["unloaded"]["device-only"]
        assert ours["latency_s"] < device_only["latency_s"]
        assert row["link"] != "wifi" or ours["device_j"] < device_only["device_j"] / 3


def test_what_hostile_load_does_to_a_server_is_what_its_files_hold() -> None:
    found, decoders = result_file.known(hostile_requests.OUT), result_file.known(hostile_bytes.OUT)
    shown = result_file.shown(hostile_requests.PAGE, hostile_requests.BEGIN, hostile_requests.END)
    assert shown == hostile_requests.page(found, decoders)
    assert found["fuzzed"]["requests"] == 100_000
    assert found["crowded"]["connections"] == 1000
    assert set(decoders) == set(hostile_bytes.NAMES)


_STUDIES = (
    *(backends, backend_answers, backend_accuracy),
    *(server_load, server_rivals, server_costs, server_memory, ray_latency),
)


@pytest.mark.parametrize("study", _STUDIES)
def test_the_tables_of_studies_are_what_their_files_hold(study: Any) -> None:
    found = result_file.known(study.OUT)
    assert result_file.shown(study.PAGE, study.BEGIN, study.END) == study.page(found)


def test_answers_by_backends_are_within_their_tolerance_on_every_network() -> None:
    for name, row in result_file.known(backend_answers.OUT).items():
        for backend, found in row["backends"].items():
            assert found["deviation"] <= found["tolerance"], (name, backend)


def test_what_students_and_codecs_keep_is_what_their_files_hold() -> None:
    text = codec_rates.PAGE.read_text()
    rates = json.loads(codec_rates.OUT.read_text())["results"]
    training = json.loads(codec_rates.TRAINING.read_text())["results"]
    students = text.partition(codec_rates.BEGIN_STUDENTS)[2].partition(codec_rates.END_STUDENTS)[0]
    assert students == f"\n\n{codec_rates.students_page(rates, training)}\n"
    assert text.partition(codec_rates.BEGIN)[2].partition(codec_rates.END)[0] == f"\n\n{codec_rates.page(rates)}\n"
    assert any(row["curve"] == "student" for row in rates["lite0"]["rates"])
    kinds = json.loads(codec_kinds.OUT.read_text())["results"]
    shown = text.partition(codec_kinds.BEGIN)[2].partition(codec_kinds.END)[0]
    assert shown == f"\n\n{codec_kinds.page(kinds)}\n"


def test_what_adapting_gains_is_what_its_file_holds_and_no_uplink_rewards_moving_averages() -> None:
    found = result_file.known(adapting.OUT)
    assert result_file.shown(adapting.PAGE, adapting.BEGIN, adapting.END) == adapting.page(found)
    assert len(found["gains"]) >= 9
    for uplink in found["gains"].values():
        ratios = {way: row["ratio"] for way, row in uplink["ways"].items()}
        assert ratios["adaptive"] <= ratios["averages"]
        assert ratios["adaptive"] <= (1.15 if uplink["longest_stall_s"] >= adapting.STALL_S else 1.05)


def test_what_a_call_and_an_exchange_cost_is_what_their_files_hold() -> None:
    found = cost_page.calls(result_file.suite("split_module"))
    assert result_file.shown(cost_page.CALLS, cost_page.BEGIN, cost_page.END) == found
    assert found.count("adaptive") >= 2
    found = cost_page.exchanges(result_file.suite("wire"))
    assert result_file.shown(cost_page.EXCHANGES, cost_page.BEGIN, cost_page.END) == found
    assert found.count("HTTP by hand") >= 2


def test_how_long_a_choice_takes_is_what_its_file_holds() -> None:
    shown = planning_page.PAGE.read_text().partition(planning_page.BEGIN)[2].partition(planning_page.END)[0]
    assert shown == f"\n\n{planning_page.table(result_file.suite('choosing_a_rate'))}\n"
    assert shown.count("µs") >= 9


def test_what_a_device_without_pytorch_takes_is_what_its_file_holds() -> None:
    results = json.loads(edge.OUT.read_text())["results"]
    shown = edge.PAGE.read_text().partition(edge.BEGIN)[2].partition(edge.END)[0]
    assert shown == f"\n\n{edge.section(results)}\n"
    assert results["installed"]["all"] <= 200e6
    assert results["import_s"] <= 0.3
    for row in results["heads"]:
        assert row["edge"]["opened_bytes"] < row["edge"]["called_bytes"] < row["pytorch"]["without_bytes"]


def test_the_evaluation_is_what_its_files_hold() -> None:
    assert evaluation.PAGE.read_text() == evaluation.page()


def test_every_cost_of_the_evaluation_follows_from_what_was_measured() -> None:
    rows = evaluation.read(evaluation.FOLDER, evaluation.CONFIGURATIONS)["results"]["configurations"]
    assert len(rows) == 48
    for row in rows:
        application = configurations.Application.read(row["application"])
        costs = application.costs(row["device"], configurations.paper_link(row["link"]))
        cuts = [configurations.cut_name(application, cut) for cut in range(len(application.layers) + 1)]
        for goal, own in costs.items():
            shown = row[goal]
            found = [shown["server_only"], shown["device_only"], shown["best"]]
            assert found == pytest.approx([own[0], own[-1], own.min()])
            for chosen in shown["chosen"].values():
                assert chosen["costs"] == pytest.approx(own[cuts.index(chosen["cut"])])


def test_the_readme_claims_what_the_evaluation_found() -> None:
    results = evaluation.read(evaluation.FOLDER, evaluation.CONFIGURATIONS)["results"]
    found = configurations.summary(results["configurations"], configurations.MEASURED)
    assert found["latency_optimal"] == found["configurations"] == 48


@pytest.mark.parametrize("page", front_page.PAGES, ids=lambda page: page.name)
def test_the_first_figures_are_those_of_their_files(page: Path) -> None:
    shown = result_file.shown(page, front_page.BEGIN, front_page.END)
    assert shown == front_page.figures(front_page.PAGES[page])
    assert shown.count("](") >= 4


def test_the_first_figures_take_what_was_run_end_to_end(tmp_path: Path) -> None:
    for name in (evaluation.CONFIGURATIONS, evaluation.TODAY):
        (tmp_path / name).write_text((evaluation.FOLDER / name).read_text())
    assert "cases" in front_page.figures("", tmp_path)
    taken_s = {"device": 0.3, "server": 0.6, "pool": 0.2}
    ways = {cut: {"cut": cut, "foretold_s": value, "measured_s": value} for cut, value in taken_s.items()}
    link = {"ways": ways, "modes": {"float32": {"ways": list(ways), "chosen": "pool"}}}
    results = {"results": {"a network": {"links": {"lte": link}}}}
    (tmp_path / end_to_end.OUT.name).write_text(json.dumps(results))
    shown = " ".join(front_page.figures("", tmp_path).split())
    assert "[1.5× as fast as the device alone](evaluation.md#end-to-end)** and 3.0× as fast as the server" in shown
    assert "One choice is a split, which is 1.50× as fast as the better end." in shown


@pytest.mark.parametrize("page", front_page.PAGES, ids=lambda page: page.name)
def test_a_number_on_a_first_page_stands_on_a_page_that_is_linked_beside_it(page: Path) -> None:
    before, _, rest = page.read_text().partition(front_page.BEGIN)
    # What a script wrote is compared with its files above. Code and what a machine must have are not claims.
    text = re.sub(
        r"```.*?```|`[^`]*`|!\[[^]]*\]\([^)]*\)", "", before + rest.partition(front_page.END)[2], flags=re.DOTALL
    )
    text = re.sub(r"Python ≥ [\d.]+|\b127\.0\.0\.1\b", "", text)
    for block in re.split(r"\n\s*\n|\n(?=[-|] )", text):
        links = re.findall(r"\]\(([^)#\s]+)", block)
        read = re.sub(r"\]\([^)]*\)", "]", block)
        if any(link.startswith("https://doi.org/") for link in links):
            read = re.sub(r"\b(19|20)\d\d\b", "", read)
        linked = " ".join((page.parent / link).read_text() for link in links if (page.parent / link).is_file())
        for number in re.findall(r"(?<![\w.-])\d+(?:[.,]\d+)*(?![\w.]*\w)", read):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", linked), f"{number} in: {block.strip()}"


def test_tables_are_fitted_as_well_as_their_file_says() -> None:
    results = json.loads(csv_import.OUT.read_text())["results"]
    shown = csv_import.PAGE.read_text().partition(csv_import.BEGIN)[2].partition(csv_import.END)[0]
    assert shown == f"\n\n{csv_import.page(results)}\n\n"
    for row in results.values():
        best = max(row["errors"][rival][2] for rival in csv_import.RIVALS)
        assert row["errors"]["ours"][2] >= best - 0.01


def test_a_kept_run_has_no_serial_number_and_every_outcome(tmp_path: Path) -> None:
    for name in ("kernels", "clocks", "overhead"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"environment": {"device": "a GPU"}, "results": {}}))
    layers = {"environment": {}, "results": {"meter": "nvml GPU GPU-68dfb800-d010"}}
    (tmp_path / "layers.json").write_text(json.dumps(layers))
    (tmp_path / "tests.txt").write_text("tests/a.py::test_one[raw] PASSED [ 4%]\ntests/a.py::test_two FAILED [ 8%]\n")
    figures.keep(tmp_path, tmp_path / "kept")
    assert figures.read(tmp_path / "kept", "layers")["results"]["meter"] == "nvml GPU"
    assert figures.read(tmp_path / "kept", "tests")["results"] == {
        "tests/a.py::test_one[raw]": "passed",
        "tests/a.py::test_two": "failed",
    }


def test_steps_that_have_not_run_leave_what_is_kept_as_it_is(tmp_path: Path) -> None:
    for folder in ("kept", "run"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kept" / "layers.json").write_text("{}\n")
    (tmp_path / "run" / "serving.json").write_text(json.dumps({"environment": {}, "results": {"a": 1}}))
    figures.keep(tmp_path / "run", tmp_path / "kept")
    assert figures.read(tmp_path / "kept", "layers") == {}
    assert figures.read(tmp_path / "kept", "serving")["results"] == {"a": 1}


def test_what_a_server_with_a_gpu_answers_is_what_its_file_holds() -> None:
    shown = result_file.shown(server_rivals.PAGE, figures.SERVING_BEGIN, figures.SERVING_END)
    assert shown == server_rivals.page(result_file.known(figures.SERVING))


def test_no_result_names_a_machine() -> None:
    for path in (ROOT / "benchmarks" / "results" / "device").rglob("*.json"):
        text = path.read_text()
        assert "GPU-" not in text, path
        assert "hostname" not in text, path
