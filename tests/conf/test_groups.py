"""Every option of every group composes; what it names can be built."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.configuration import CONF, composed, options

# These groups say how the job runs, not what it builds; they are built by the end-to-end tests.
NOT_BUILT = {"debug", "experiment", "hydra", "paths", "sweep", "trainer", "data", "model", "local"}
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


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiment_states_command_and_number(experiment: str) -> None:
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert text.startswith(f"# @package _global_\n# python run.py experiment={experiment}\n# expected: ")
