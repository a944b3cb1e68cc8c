"""What a run says about its settings before it starts: differences from the defaults, the tree, the quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from callbacks import report
from run import run_job
from tests.configuration import CONF, SMALL, composed


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    """Stands in for the console of the report, wide enough for its tables, and keeps what is printed."""
    kept = Console(width=200, record=True)
    monkeypatch.setattr(report, "console", kept)
    return kept


@pytest.fixture
def hydra() -> Iterator[None]:
    """Hydra as it stands inside a run."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.mark.usefixtures("hydra")
def test_differences_are_what_was_chosen_and_nothing_else() -> None:
    assert report.differences(compose("config")) == []
    chosen = compose("config", ["bits=w3a3", "seed=7", "reconstruction.holdout=0.1", "paths.data=elsewhere"])
    assert sorted(report.differences(chosen)) == [  # where files lie is no difference
        ("bits.activation", "4", "3"),
        ("bits.weight", "4", "3"),
        ("reconstruction.holdout", "0.0", "0.1"),
        ("seed", "0", "7"),
    ]


@pytest.mark.usefixtures("hydra")
def test_what_only_one_side_has_is_absent_on_the_other() -> None:
    found = {key: (old, new) for key, old, new in report.differences(compose("config", ["weight=flexround"]))}
    assert found["weight.warmup"] == ("0.2", "(absent)")
    assert found["weight.learn_scale"] == ("(absent)", "True")
    assert found["weight._target_"] == ("quantizers.adaround.AdaRound", "quantizers.flexround.FlexRound")


@pytest.mark.usefixtures("hydra")
def test_differences_are_printed_without_being_asked_for(console: Console) -> None:
    report.show_configuration(compose("config", ["weight.lr=0.5"]), show_tree=False)
    printed = console.export_text()
    assert "differences from the defaults" in printed
    (line,) = [line for line in printed.splitlines() if "weight.lr" in line]
    assert "0.001" in line
    assert "0.5" in line
    assert "regularizer_weight" not in printed


@pytest.mark.usefixtures("hydra")
def test_defaults_are_said_to_be_the_defaults(console: Console) -> None:
    report.show_configuration(compose("config"), show_tree=False)
    assert "all settings are the defaults" in console.export_text()


@pytest.mark.usefixtures("hydra")
def test_the_whole_configuration_is_shown_on_demand(console: Console) -> None:
    report.show_configuration(compose("config"), show_tree=True)
    printed = console.export_text()
    for text in ("reconstruction", "regularizer_weight: 100.0", "placement: block_output", "input_size:"):
        assert text in printed


@pytest.mark.parametrize("show", [True, False])
def test_every_quantizer_is_shown_on_demand(show: bool, console: Console, tmp_path: Path) -> None:
    quick = ["calibration=noise", "reconstruction=none", f"show.quantizers={show}"]
    run_job(composed([*SMALL, *quick], tmp_path))
    printed = console.export_text()
    assert ("quantizers, protocol brecq" in printed) == show
    rows = (tmp_path / "quantizers.csv").read_text().splitlines()[1:]
    lines = [
        line for line in printed.splitlines() if "NearestActivation" in line or "AdaRound" in line or "LSQ" in line
    ]
    assert len(lines) == (len(rows) if show else 0)
