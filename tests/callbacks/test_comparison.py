"""Two runs or two sweeps: what differs is shown, what is a consequence of a choice is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from callbacks.comparison import compare, read_record
from tests.callbacks.sweeps import record, write


def changed(rows: list[dict], start: str) -> dict[str, tuple]:
    return {row["what"]: (row["a"], row["b"]) for row in rows if row["what"].startswith(start)}


def test_runs_differ_in_settings_versions_and_metrics(tmp_path: Path) -> None:
    a = write(tmp_path, "a", record(top1=80.0))
    other = record(generator="zeroq", top1=80.5, versions={"torch": "2.9.0"}, machine="another")
    other["config"]["calibration"]["count"] = 256
    b = write(tmp_path, "b", other)
    rows = compare(a / "record.json", b)
    assert changed(rows, "config") == {
        "config generator": ("dsg", "zeroq"),  # and not the steps that come with it
        "config calibration.count": ("128", "256"),
    }
    assert changed(rows, "version") == {"version torch": ("2.8.0", "2.9.0")}
    assert changed(rows, "machine") == {"machine": ("a computer, 1 threads", "another")}
    (top1,) = [row for row in rows if row["what"] == "test/quantized/top1"]
    assert top1["b - a"] == 0.5


def test_equal_runs_differ_in_nothing(tmp_path: Path) -> None:
    rows = compare(write(tmp_path, "a", record()), write(tmp_path, "b", record()))
    assert all(row["what"].startswith("test/") and row["b - a"] == 0 for row in rows)


def test_sweeps_are_matched_by_what_differs_within(tmp_path: Path) -> None:
    for name, steps, gain in (("a", 100, 0.0), ("b", 200, 1.5)):
        for bits in (4, 2) if name == "a" else (4, 8):
            for seed in (0, 1):
                facts = record(bits=bits, seed=seed, top1=80.0 + gain + seed)
                facts["config"]["generator"]["steps"] = steps
                write(tmp_path / name, f"{bits}{seed}", facts)
    rows = compare(tmp_path / "a", tmp_path / "b")
    assert changed(rows, "config") == {"config generator.steps": ("100", "200")}
    assert changed(rows, "top-1") == {
        "top-1 bits=w4a4": ("80.50 ± 0.71", "82.00 ± 0.71"),
        "top-1 bits=w2a2": ("80.50 ± 0.71", "(absent)"),
        "top-1 bits=w8a8": ("(absent)", "82.00 ± 0.71"),
    }
    assert [row["b - a"] for row in rows if row["what"] == "top-1 bits=w4a4"] == [1.5]


def test_a_run_and_a_sweep_are_not_compared(tmp_path: Path) -> None:
    run = write(tmp_path / "sweep", "a", record())
    with pytest.raises(ValueError, match="two runs or two sweeps"):
        compare(run, tmp_path / "sweep")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "corrupt"), ("[]", "no configuration"), ("{}", "no configuration")]
)
def test_what_is_no_record_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_record(tmp_path)
    with pytest.raises(ValueError, match=r"expected a record\.json"):
        read_record(tmp_path / "none")
