"""The console command `calibrant`: the main job, and what is done with a finished run.

calibrant [overrides]                 the main job, as `python run.py`
calibrant export <run folder>         model.onnx beside the student, compared with it tensor by tensor
calibrant evaluate <run folder>       score the student again, without calibrating
calibrant benchmark <run folder>      bytes and latency, float against quantized, in onnxruntime and OpenVINO
calibrant report <sweep folder>       table, plots and report.html of a sweep, also while it runs
calibrant verify <record.json>        run it again and compare every metric bitwise
calibrant compare <a> <b>             differences of two runs or two sweeps
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import run
from callbacks import comparison, report, sweep_report
from deployment.containers import Container
from deployment.exports import FILE, OnnxExport
from deployment.onnx_export import expect_known
from deployment.openvino_model import RuntimeProcessError
from deployment.parity import ParityError
from lightning_modules.deployed import export_saved, measure_saved
from lightning_modules.repeated_runs import DIFFERENT, EQUAL, NOT_COMPARABLE, repeat
from lightning_modules.run_folders import one_line


def export(arguments: Sequence[str]) -> None:
    """`calibrant export`."""
    parser = _parser("export", "Write the student of a run as ONNX and compare it in its runtimes.")
    parser.add_argument("--container", choices=get_args(Container), default="auto", help="see docs/deployment.md")
    parser.add_argument("--opset", type=int, help="the lowest that has the container's types if left out")
    parser.add_argument("--compared", type=int, default=64, help="noise images to compare on; 0: do not compare")
    parser.add_argument("--output", type=Path, help="model.onnx in the run's folder if left out")
    parser.add_argument("--openvino", action="store_true", help="compare in OpenVINO as well")
    given = parser.parse_args(arguments)
    if given.opset is not None:
        expect_known(given.opset, "--opset")
    chosen = OnnxExport(container=given.container, opset=given.opset, compared=given.compared, openvino=given.openvino)
    remedy = "leave --opset out for the lowest that will do, or choose another --container"
    try:
        with _runtime_heeded(f"--opset {given.opset}, --container {given.container}: the file is refused", remedy):
            path, rows = export_saved(given.folder, chosen, given.output)
    except OSError as error:
        raise ValueError(
            f"--output: expected a file that can be written, got {given.output or given.folder / FILE} "
            f"({error.strerror or error}); name one in a folder where you may write"
        ) from error
    worst = max((row.steps for row in rows), default=0.0)
    parity = f"every tensor within {worst:.2g} steps of the student" if rows else "not compared"
    report.console.print(f"{path}: {path.stat().st_size / 1024:.0f} KiB, {parity}", highlight=False)


def evaluate(arguments: Sequence[str]) -> None:
    """`calibrant evaluate`: the main job with `evaluate=`."""
    folder, *others = arguments or ["--help"]
    if folder.startswith("-"):
        _parser("evaluate", "Score the student of a run again.").parse_args([folder])
    sys.argv[1:] = [f"evaluate={folder}", *others]
    run.main()


def benchmark(arguments: Sequence[str]) -> None:
    """`calibrant benchmark`."""
    parser = _parser("benchmark", "Time float network and student in their runtimes, in turns, warm, medians.")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--threads", type=int, default=1, help="inside an operator")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each model, an odd number")
    parser.add_argument("--openvino", action="store_true", help="time both in OpenVINO as well")
    given = parser.parse_args(arguments)
    with _runtime_heeded(
        f"folder: {given.folder / FILE} is refused", f"write it anew: calibrant export {given.folder}"
    ):
        options = {"batch": given.batch, "threads": given.threads, "rounds": given.rounds, "openvino": given.openvino}
        found = measure_saved(given.folder, **options, table=True)
    models = [row | {"bytes": found.bytes[row["model"]]} for row in report.as_rows(found.models)]
    title = f"batch {given.batch}, {given.threads} threads"
    report.show_rows(title, models, show=True, path=given.folder / "latency.csv")
    operators = report.as_rows(sorted(found.operators, key=lambda row: -row.microseconds))
    report.show_rows("slowest operators", operators[:10], show=True)
    report.write_csv(given.folder / "operators.csv", operators)
    report.show_rows("layers", report.as_rows(found.layers), show=False, path=given.folder / "layers.csv")
    report.write_csv(given.folder / "latency_table.csv", report.as_rows(found.table))
    written = "latency.csv, operators.csv, layers.csv, latency_table.csv"
    report.console.print(f"{written} in {given.folder}", highlight=False)


def make_report(arguments: Sequence[str]) -> None:
    """`calibrant report`."""
    parser = _parser("report", "Table, csv, markdown, plots and report.html of a sweep, as it stands.", of="a sweep")
    sweep_report.make_report(parser.parse_args(arguments).folder)


def verify(arguments: Sequence[str]) -> None:
    """`calibrant verify`: exit code 0 if equal, 1 if not, 3 if not but versions or machine are others."""
    parser = _parser("verify", "Run a record again, images included, and compare metrics bitwise.")
    parser.add_argument("--output", type=Path, help="keep the repeated run there; a temporary folder if left out")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.output or Path(temporary) / "again").absolute()
        found = repeat(given.folder, folder, run.run_job, Path(run.__file__))
    report.show_rows("metrics", found.metrics, show=True)
    report.show_rows("made by other things than the record", found.origins, show=True)
    words = {
        EQUAL: "every metric is equal, bitwise",
        DIFFERENT: "metrics differ, with the same versions on the same machine",
        NOT_COMPARABLE: "metrics differ, as they may with other versions or on another machine",
    }
    report.console.print(words[found.code], highlight=False)
    if found.code:
        raise SystemExit(found.code)


def compare(arguments: Sequence[str]) -> None:
    """`calibrant compare`."""
    parser = argparse.ArgumentParser(prog="calibrant compare", description="Differences of two runs or two sweeps.")
    parser.add_argument("a", type=Path, help="record.json, folder of a run, or folder of a sweep")
    parser.add_argument("b", type=Path, help="the same")
    given = parser.parse_args(arguments)
    report.show_rows(f"{given.a} and {given.b}", comparison.compare(given.a, given.b), show=True)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "export": export,
    "evaluate": evaluate,
    "benchmark": benchmark,
    "report": make_report,
    "verify": verify,
    "compare": compare,
}


def main() -> None:
    """A command where the first word is one, else the main job."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in COMMANDS:
        run.main()
        return
    try:
        COMMANDS[word](sys.argv[2:])
    except (ValueError, ParityError, RuntimeProcessError) as error:
        raise SystemExit(f"calibrant {word}: {error}") from error
    except OSError as error:
        raise SystemExit(
            f"calibrant {word}: folder: cannot read or write {error.filename or 'a file in it'} "
            f"({error.strerror or error}); check that you may, and that the disk has room"
        ) from error


@contextmanager
def _runtime_heeded(what: str, remedy: str) -> Iterator[None]:
    """What onnxruntime raises, as a mistake of the user's; its exceptions have no base of their own."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise ValueError(f"{what} by onnxruntime ({one_line(error)}); {remedy}") from error


def _parser(name: str, description: str, of: str = "a finished run") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"calibrant {name}", description=description)
    parser.add_argument("folder", type=Path, help=f"of {of}")
    return parser


if __name__ == "__main__":
    main()
