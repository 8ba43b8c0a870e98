"""Results files, the tables made of them, and the plots."""

from __future__ import annotations

import sys

import pytest
import torch
from benchmark_helpers import a_row, some_results

from benchmarks import end_to_end, plots, report, results_file, suite
from benchmarks.__main__ import main
from benchmarks.records import IDS_ONLY


def names(directory) -> list[str]:
    return [found["name"] for found in results_file.newest_of_each_machine(directory)]


def everything(directory) -> str:
    return report.everything(results_file.newest_of_each_machine(directory))


def summary(directory) -> str:
    return report.summary(results_file.newest_of_each_machine(directory))


def test_newest_results_by_machine_and_date(tmp_path):
    assert results_file.newest_of_each_machine(tmp_path) == []
    for found in (some_results(), some_results(quick=True), some_results("2026-11-21")):
        results_file.write(found, tmp_path)
    results_file.write(some_results("2026-10-01", device="cuda", name="NVIDIA H200"), tmp_path)
    (tmp_path / "static.json").write_text("{}")
    stems = {"cpu-2026-11-21", "cpu-2026-11-22", "cpu-2026-11-22-quick", "nvidia-h200-2026-10-01", "static"}
    assert {file.stem for file in tmp_path.iterdir()} == stems
    gpu, chosen = results_file.newest_of_each_machine(tmp_path)
    assert (chosen["date"], chosen["quick"]) == ("2026-11-22", False)
    assert gpu["name"] == "NVIDIA H200"
    results_file.write(some_results("2026-11-23", name="Another CPU"), tmp_path)
    assert names(tmp_path) == ["NVIDIA H200", "Another CPU", "A CPU"]


def test_tables_are_rebuilt_between_the_markers():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    told = report.between_markers(text, "new")
    assert told == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.between_markers(told, "new") == told


@pytest.mark.parametrize("text", ["", report.BEGIN, report.END + report.BEGIN, (report.BEGIN + report.END) * 2])
def test_a_text_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match="expected <!-- benchmarks:begin --> and then <!-- benchmarks:end -->"):
        report.between_markers(text, "")


def test_every_table_of_every_machine_is_told(tmp_path):
    assert everything(tmp_path) == report.NOT_MEASURED
    results_file.write(some_results(), tmp_path)
    told = everything(tmp_path)
    assert "| small | training step | 2.00 ms, 5,000 tokens/s | 5.00 ms, 2,000 tokens/s | 2.50x | 1.00 ms / " in told
    rows = "| 8x9 | 2.00 ms | 50 % | 5.00 ms | 2.50x | 5.00 ms, x-transformers | 2.50x |"
    assert rows in told.partition("### `sample_tokens`")[2].partition("###")[0]
    assert report.NOT_MEASURED in told
    results_file.write(some_results(device="cuda", name="NVIDIA H200", clocks={"clocks.sm": "1980 MHz"}), tmp_path)
    told = everything(tmp_path)
    assert report.NOT_MEASURED not in told
    assert told.index("## NVIDIA H200\n\nbfloat16; torch 2, clocks.sm 1980 MHz;") < told.index(
        "## A CPU\n\n2 threads"
    )


def test_ids_only_stand_for_themselves_and_the_hosts_time_beside_them(tmp_path):
    found = some_results(device="cuda")
    found["rows"] = [
        a_row("sample_tokens", "8x9", "fastmask", 2.0, host_ms=0.05),
        a_row("sample_tokens", "8x9", "x-transformers", 5.0, host_ms=0.1),
        a_row("sample_tokens", "8x9", "fastmask, ids only", 1.5, name="fastmask", given=IDS_ONLY),
        a_row("sample_tokens", "8x9", "FlashInfer, ids only", 1.0, name="FlashInfer", given=IDS_ONLY),
        a_row("sample_tokens", "8x9", "vLLM, ids only", 0.5, name="vLLM", given=IDS_ONLY, status="wrong"),
    ]
    results_file.write(found, tmp_path)
    assert (
        "| 8x9 | 2.00 ms | 50 % | 5.00 ms | 2.50x | 5.00 ms, x-transformers | 2.50x "
        "| 1.50 ms | 1.00 ms, FlashInfer | 0.67x | 50.0 us / 100 us |"
    ) in everything(tmp_path)


def test_the_summary_tells_least_and_largest_gain_of_the_first_machine(tmp_path):
    assert summary(tmp_path) == report.NOT_MEASURED
    found = some_results()
    found["rows"] += [
        a_row("train", case, contender, ms)
        for case, theirs in (("B 8, N 9, V 7, D 5", 1.0), ("middle", 6.0), ("large", 8.0))
        for contender, ms in (("fastmask", 2.0), ("x-transformers", theirs))
    ]
    results_file.write(found, tmp_path)
    told = summary(tmp_path)
    assert told.startswith(
        f"{report.NOT_MEASURED}\n\n**A CPU**: 2 threads, float32; torch 2; commit abc, 2026-11-22."
    )
    assert told.splitlines()[-3:] == [
        "| training step | B 8, N 9, V 7 | 2.00 ms | 1.00 ms | 0.50x |",
        "| training step | large | 2.00 ms | 8.00 ms | 4.00x |",
        "| `generate`, 18 steps | small | 2.00 ms | 5.00 ms | 2.50x |",
    ]
    results_file.write(some_results("2026-10-01", device="cuda", name="NVIDIA H200"), tmp_path)
    assert summary(tmp_path).startswith("**NVIDIA H200**: bfloat16; torch 2")
    assert "A CPU" not in summary(tmp_path)


def test_report_rebuilds_both_files_and_the_plots(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    results, files = tmp_path / "results", [tmp_path / "README.md", tmp_path / "benchmarks" / "README.md"]
    files[1].parent.mkdir()
    for file in files:
        file.write_text(f"{report.BEGIN}{report.END}")
    results_file.write(some_results(), results)
    drawn = []
    monkeypatch.setattr(plots, "plot", lambda found, file: drawn.append(file.name))
    assert main(["report", "--output", str(results)]) == 0
    for file, told in zip(files, (summary(results), everything(results)), strict=True):
        assert file.read_text() == f"{report.BEGIN}\n{told}\n{report.END}"
    assert drawn == [next(results.glob("*.json")).name]


def test_what_a_machine_has_not_measured_has_no_column(tmp_path):
    found = some_results()
    for row in found["rows"]:
        row["peak_mib"] = None
    results_file.write(found, tmp_path)
    assert "both compiled" not in everything(tmp_path)
    assert "both CUDA graphs" not in everything(tmp_path)
    found["rows"] += [
        a_row("train", "small", "fastmask, network compiled", 1.0),
        a_row("train", "small", "x-transformers, network compiled", 4.0),
        a_row("train", "small", end_to_end.GRAPHS["fastmask"], 1.0),
        a_row("train", "small", end_to_end.GRAPHS["x-transformers"], 3.0),
    ]
    results_file.write(found, tmp_path)
    assert "| faster | both compiled | both CUDA graphs |" in everything(tmp_path)
    assert "| 2.50x | 4.00x | 3.00x |" in everything(tmp_path)


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_the_newest_results_are_told(name):
    text = (report.ROOT / name).read_text()
    tables = report.texts(results_file.newest_of_each_machine())[name]
    assert report.between_markers(text, tables) == text, "run python -m benchmarks report"


def test_results_has_the_newest_file_of_each_machine():
    files = set(results_file.DIRECTORY.glob("*-????-??-??*.json"))
    newest = results_file.newest_of_each_machine()
    of_newest = {results_file.path(found, results_file.DIRECTORY) for found in newest}
    assert files == of_newest, "remove the older files of the same machine, and their plots"
    stems = tuple(file.stem for file in files)
    assert all(plot.name.startswith(stems) for plot in results_file.DIRECTORY.glob("*.png"))


@pytest.mark.parametrize("found", results_file.newest_of_each_machine(), ids=lambda found: found["name"])
def test_results_are_of_cases_that_are_measured_today(found):
    """Names and labels follow the operations, so that a run can be resumed and compared."""
    assert {row["operation"] for row in found["rows"]} <= {benchmark.name for benchmark in suite.BENCHMARKS}
    if found["device"] == "cpu" and not torch.cuda.is_available():
        cases = {(benchmark.name, str(case)) for benchmark in suite.BENCHMARKS for case in benchmark.cases(False)}
        assert {(row["operation"], row["case"]) for row in found["rows"]} <= cases


def test_plots(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "cpu.json"
    names = ("percent-of-floor", "time-against-mask-ratio", "memory-against-vocabulary", "end-to-end")
    written = plots.plot(some_results(), file)
    assert [plot.name for plot in written] == [f"cpu-{name}.png" for name in names]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in written)
    assert plots.plot(some_results(rows=[]), file) == []
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.plot(some_results(), file) == []
    assert "no plots: matplotlib is not installed" in capsys.readouterr().out


def test_a_plot_shows_ours_eager_and_the_fastest(monkeypatch):
    rows = [a_row("sample_tokens", "8x9", f"peer {ms}", ms + 1.0) for ms in range(20)]
    rows += [a_row("sample_tokens", "8x9", "fastmask", 99.0), a_row("sample_tokens", "8x9", "x-transformers", 98.0)]
    assert plots._contenders_shown(rows) == ["x-transformers", "fastmask", *(f"peer {ms}" for ms in range(4))]
