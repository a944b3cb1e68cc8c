"""What every option of conf/reconstruction, and every objective, must keep; a new yaml is tested without a new test."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from quantizers.adaquant import AdaQuant
from quantizers.gptq import GPTQ
from quantizers.ranges import MinMax
from reconstruction.objectives import Objective
from tests.configuration import CONF, options
from tests.contract.test_quantizers import factory
from tests.lightning_modules.reconstruction_runs import trainer_of
from tests.reconstruction.students import images, resnet8, student_of

OBJECTIVES = sorted(path.stem for path in (CONF / "reconstruction" / "objective").glob("*.yaml"))
SMALL: dict[str, Any] = {"seed": 0, "batch_size": 4, "forward_batch_size": 16}


def option_of(name: str, *overrides: str) -> DictConfig:
    """One option of the group, without the rest of the configuration, which takes long to compose."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(f"reconstruction/{name}", overrides=list(overrides)).reconstruction


def learned(name: str, *overrides: str) -> Any:
    """Two steps of every unit of a small student."""
    x = images(6)
    cfg = option_of(name, *overrides, "reconstruction.iterations=2")
    solved = cfg.get("phases") == "closed_form"
    straight = partial(AdaQuant, range=MinMax()) if cfg.get("regularizer_weight") == 0 else None
    weight = partial(GPTQ, range=MinMax()) if solved else straight
    module, datamodule = instantiate(cfg)(conversion=student_of(resnet8(), x, weight=weight), images=x, **SMALL)
    if module.has_work:
        trainer_of(module).fit(module, datamodule=datamodule)
    return module


def check(module: Any) -> None:
    assert len(module.results) == (len(module.epochs) or len(closed_form_units(module)))
    assert all(math.isfinite(value) for row in module.results for value in row.values() if isinstance(value, float))
    assert not any(parameter.requires_grad for parameter in module.student.parameters())


def closed_form_units(module: Any) -> list[str]:
    """Rows of units that were solved without a Trainer; none where nothing is learned."""
    return [row["unit"] for row in module.results if row["phase"] == "closed_form"]


@pytest.mark.parametrize("option", options("reconstruction"))
def test_every_option_learns_all_units_to_finite_errors(option: str) -> None:
    check(learned(option))


class Middle(nn.Sequential):
    """Three convolutions, of which the second is the one at few bits; wide, since what one channel learns is chance."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1))


LEARNED = [
    option
    for option in options("weight")
    if not option.endswith("_published")  # stated for lengths of their own
    and option != "signround"  # published, and there the best of all steps is kept; see docs/methods/signround.md
    and factory("weight", option)(torch.randn(2, 2), 4).parameter_groups()
]


@pytest.mark.parametrize("option", LEARNED)
def test_every_learned_rounding_is_better_than_the_nearest_in_the_default_steps(option: str) -> None:
    x = torch.nn.functional.avg_pool2d(images(64, size=20, channels=3), 3, stride=1)  # neighbours alike, as in images
    student = student_of(
        Middle().eval(), x, bits=(3, 8), weight=factory("weight", option), activation=factory("activation", "lsq")
    )
    cfg = option_of("fast", "reconstruction.batch_size=16", "reconstruction.granularity=layer")
    module, datamodule = instantiate(cfg)(conversion=student, images=x, seed=0, holdout=0.25)
    trainer_of(module).fit(module, datamodule=datamodule)
    row = module.results[1]
    assert row["error_hard_holdout"] < row["error_nearest_holdout"], row


@pytest.mark.parametrize("option", [o for o in options("reconstruction") if o not in ("none", "closed_form")])
def test_every_option_takes_every_objective(option: str) -> None:
    for objective in OBJECTIVES:
        cfg = option_of(option, f"reconstruction/objective={objective}")
        assert isinstance(instantiate(cfg.objective), Objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_all_units_to_finite_errors(objective: str) -> None:
    check(learned("qdrop", f"reconstruction/objective={objective}"))
    first = (CONF / "reconstruction" / "objective" / f"{objective}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")


def test_presets_are_what_their_names_say() -> None:
    names = {name: option_of(name) for name in options("reconstruction")}
    assert names["adaquant"].schedule == "sequential"
    assert names["adaquant_parallel"] == OmegaConf.merge(names["adaquant"], {"schedule": "parallel"})
    assert names["adaquant_published"] == OmegaConf.merge(names["adaquant"], {"bias_relative": False})
    assert names["genie_m"] == names["qdrop"]
    assert names["flexround"] == OmegaConf.merge(names["qdrop"], {"iterations": 5000})
    assert names["signround"] == OmegaConf.merge(names["qdrop"], {"iterations": 200, "batch_size": 8, "drop": 0.0})
    assert "fisher" in names["brecq_fisher"].objective._target_
    assert set(names["brecq_fisher"].objective) == {"_target_"}
    assert (names["pd_quant"].objective.weight, names["pd_quant"].objective.temperature) == (10.0, 4.0)
    assert names["pd_quant"].drop == 0.5
    assert names["network"].objective.temperature == 1.0
