"""Every option of every group composes; what it names can be built."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.configuration import CONF, composed, options

# These groups say how the job runs, not what it builds; they are built by the end-to-end tests.
NOT_BUILT = {"debug", "experiment", "hydra", "paths", "pipeline", "sweep", "trainer", "data", "model", "local"}
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "__pycache__")
ALL = [(group, option) for group in GROUPS for option in options(group)]


@pytest.mark.parametrize(("group", "option"), ALL)
def test_composes_and_resolves(group: str, option: str, tmp_path: Path) -> None:
    if group == "hydra":
        pytest.skip("composed with every other option")
    cfg = composed([f"{'+' if group in ('local',) else ''}{group}={option}"], tmp_path)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize(("group", "option"), [pair for pair in ALL if pair[0] not in NOT_BUILT])
def test_can_be_built(group: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = composed([f"{group}={option}"], tmp_path)
    built = instantiate(cfg[group])
    assert built is not None


@pytest.mark.parametrize(("group", "option"), ALL)
def test_says_what_it_is(group: str, option: str) -> None:
    first = (CONF / group / f"{option}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 10


NUMBER = r"\d+(?:\.\d+)?"
EXPECTED = re.compile(rf"^# expected: {NUMBER} ± {NUMBER}\b")
TIME = re.compile(rf"\bin (?:about |under )?{NUMBER}(?: to {NUMBER})? (?:seconds|minutes|hours) on \S")


def says_what_to_expect(header: list[str]) -> bool:
    """A number with its tolerance, the time and the machine."""
    return EXPECTED.match(header[0]) is not None and TIME.search(" ".join(header)) is not None


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiment_states_command_number_tolerance_time_and_machine(experiment: str) -> None:
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert header[:2] == ["# @package _global_", f"# python run.py experiment={experiment}"]
    assert says_what_to_expect(header[2:])


@pytest.mark.parametrize(
    "line",
    [
        "# expected: see benchmarks/results/cifar10.csv",
        "# expected: 91.0 in 7 minutes on 1 thread",
        "# expected: 91.0 ± 0.5",
        "# expected: 91.0 ± 0.5 in 7 minutes",
    ],
)
def test_less_than_that_would_be_noticed(line: str) -> None:
    assert not says_what_to_expect([line])
