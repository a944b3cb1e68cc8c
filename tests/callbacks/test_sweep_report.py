"""The report of a sweep: what stands in the table, the csv, the text, the plots and the page."""

from __future__ import annotations

import csv
import html.parser
import io
import itertools
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from base64 import b64decode
from pathlib import Path

import pytest
from rich.console import Console

from callbacks.sweep_page import page
from callbacks.sweep_plan import PlannedJob, SweepPlan
from callbacks.sweep_plots import as_svg, front, heat_map, pareto
from callbacks.sweep_report import make_report, markdown, sweep_table
from callbacks.sweep_results import read_sweep
from deployment.whole_file import whole_file
from tests.callbacks.sweeps import record, write
from tests.configuration import ROOT

TOPS = {
    ("dsg", 8): 90.0,
    ("dsg", 4): 85.0,
    ("dsg", 2): 40.0,
    ("zeroq", 8): 89.0,
    ("zeroq", 4): 86.0,
    ("zeroq", 2): 30.0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for (generator, bits), seed in itertools.product(TOPS, (0, 1)):
        facts = record(generator=generator, bits=bits, seed=seed, top1=TOPS[generator, bits] + seed)
        write(tmp_path, f"{generator}{bits}-{seed}", facts)
    broken = record(generator="<b>bad</b>", status="failed", error="ValueError: a | b <script>\nmore")
    write(tmp_path, "broken", broken)
    return tmp_path


def test_all_files_are_left_and_nothing_else(folder: Path) -> None:
    make_report(folder)
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {"sweep.csv", "sweep.md", "report.html", "pareto.png", "heat_map.png"}


LOOP = """
import sys
from pathlib import Path
from callbacks import sweep_report

sweep_report.pareto = sweep_report.heat_map = lambda settings: None  # which take long
sweep_report.page = lambda sweep, made: "page"
sweep_report.report.console.quiet = True
for _ in range(100):
    sweep_report.make_report(Path(sys.argv[1]))
"""


def test_processes_that_make_it_at_one_time_do_not_meet(folder: Path) -> None:
    (folder / ".sweep.csv.0.tmp").write_text("of one that was killed")
    loops = [
        subprocess.Popen([sys.executable, "-c", LOOP, str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=-1)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=200)[1].decode() for process in loops]
    assert [process.returncode for process in loops] == [0, 0], errors
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"sweep.csv", "sweep.md", "report.html"}
    assert len((folder / "sweep.csv").read_text().splitlines()) == 14


def test_files_written_at_one_time_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.csv"
    with whole_file(target, several=True) as first, whole_file(target, several=True) as second:
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # the last to end
    with pytest.raises(FileNotFoundError), whole_file(target, several=True):
        pass
    assert target.read_text() == "first"
    assert list(target.parent.iterdir()) == [target]


def test_csv_has_a_row_a_run_also_for_failed_ones(folder: Path) -> None:
    make_report(folder)
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert len(rows) == 13
    (failed,) = [row for row in rows if row["status"] == "failed"]
    assert failed["error"] == "ValueError: a | b <script>"
    assert (failed["seed"], failed["w_bits"], failed["top1"]) == ("0", "4", "")
    assert sorted(float(row["top1"]) for row in rows if row["top1"]) == sorted(
        t + s for t in TOPS.values() for s in (0, 1)
    )


def test_tables_have_mean_and_deviation_and_the_error(folder: Path) -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(sweep_table(read_sweep(folder)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for shown in (text, markdown(read_sweep(folder))):
        assert f"{statistics.mean([85, 86]):.2f} ± {statistics.stdev([85, 86]):.2f}" in shown
        assert "ValueError: a" in shown
        assert "12 finished, 1 failed of 13" in shown
    assert "\n| dsg | w4a4 | resnet | brecq | 128 dsg, 500 steps | 0, 1 |" in markdown(read_sweep(folder))
    assert "a \\| b" in markdown(read_sweep(folder))


def test_runs_that_did_not_score_nearest_have_no_such_column(tmp_path: Path) -> None:
    write(tmp_path, "a", record(nearest=None))
    make_report(tmp_path)
    assert "nearest" not in (tmp_path / "sweep.md").read_text()


def test_the_front_is_what_nothing_beats(folder: Path) -> None:
    settings = read_sweep(folder).settings
    found = {(s.values["generator"], s.values["bits"]) for s in front(settings)}
    points = {s: (s.kib or 0.0, statistics.mean(s.metrics("quantized"))) for s in settings}
    unbeaten = {
        (s.values["generator"], s.values["bits"])
        for s, (size, top) in points.items()
        if not any((a <= size and b > top) or (a < size and b >= top) for a, b in points.values())
    }
    assert found == unbeaten == {("dsg", "w2a2"), ("zeroq", "w4a4"), ("dsg", "w8a8")}


def test_plots_have_labels_with_units(folder: Path) -> None:
    settings = read_sweep(folder).settings
    first, second = pareto(settings), heat_map(settings)
    assert first is not None
    assert second is not None
    assert first.axes[0].get_xlabel() == "size of the quantized weights (KiB)"
    assert first.axes[0].get_ylabel() == "top-1 (%)"
    texts = [text.get_text() for text in second.axes[0].texts]
    assert {"85.50", "86.50", "generator=dsg", "generator=zeroq"} < set(texts)
    assert [t.get_text() for t in second.axes[0].get_xticklabels()] == ["W8A8", "W4A4", "W2A2"]
    assert as_svg(first) == as_svg(pareto(settings) or first)


def test_a_single_run_has_no_heat_map(tmp_path: Path) -> None:
    write(tmp_path, "a", record())
    settings = read_sweep(tmp_path).settings
    assert heat_map(settings) is None
    assert pareto(settings) is not None
    assert pareto([]) is None


class Tags(html.parser.HTMLParser):
    """Collects tags with their attributes, and checks that they close."""

    EMPTY = frozenset({"meta", "img", "source", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(folder: Path) -> None:
    text = page(read_sweep(folder), "today")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    addresses = [value for _, attrs in tags.found for key, value in attrs.items() if key in ("src", "srcset", "href")]
    inside = [address for address in addresses if (address or "").startswith("#")]
    assert inside == ["#plots", "#images", "#failures"]
    addresses = [address for address in addresses if address not in inside]
    assert len(addresses) == 2 * 2 + 2  # two plots in two lights, images of two generators
    assert all((address or "").startswith("data:image/") for address in addresses)
    assert not re.search(r"https?://(?!www\.w3\.org)", text.replace(" ", ""))
    assert "@import" not in text
    assert "url(" not in text
    assert "<script>\nmore" not in text  # an error is text
    assert "ValueError: a | b &lt;script&gt;\nmore" in text
    rows = [attrs for tag, attrs in tags.found if tag == "tr"]
    assert len(rows) == 1 + len(TOPS)
    assert sum(attrs.get("class") == "best" for attrs in rows) == 1


def test_the_pages_plots_are_drawings_and_its_pictures_are_reduced(folder: Path) -> None:
    text = page(read_sweep(folder), "today")
    for content in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text):
        assert ET.fromstring(b64decode(content)).tag.endswith("svg")
    (size,) = {b64decode(content)[16:24] for content in re.findall(r'src="data:image/png;base64,([^"]+)"', text)}
    assert int.from_bytes(size[:4]) == 480


def test_a_sweep_without_results_has_a_page_too(tmp_path: Path) -> None:
    SweepPlan("study", [["bits=w4a4,w2a4"]], [PlannedJob("a", ["bits=w4a4"], "0")]).write(tmp_path)
    make_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "No run has finished yet" in text
    assert "1</b> not run" in text
    assert "python run.py -m bits=w4a4,w2a4" in text
