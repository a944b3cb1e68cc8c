from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.reconstruction import build_reconstruction
from lightning_modules.shared_reconstruction import learn_in_shares, recipe_of
from quantizers.convert import Conversion
from quantizers.layer import quantizers_of
from synthesis.store import SampleStore
from tests.lightning_modules import shared_units
from tests.lightning_modules.reconstruction_runs import SETTINGS, learn, same, trainer_of
from tests.reconstruction.students import images, resnet8, student_of

PARALLEL: dict[str, Any] = SETTINGS | {"schedule": "parallel", "iterations": 3}


def shared(conversion: Conversion, store: Path, shares: int, **arguments: Any) -> list[dict[str, Any]]:
    x = images(10)
    build = functools.partial(build_reconstruction, conversion=conversion, images=x, **(PARALLEL | arguments))
    return learn_in_shares(
        build,
        lambda module, datamodule: trainer_of(module).fit(module, datamodule=datamodule),
        shares=shares,
        store=SampleStore(store),
        recipe=recipe_of(conversion, x, {}),
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_learn_what_one_learns_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.lightning_modules.shared_units", str(tmp_path), "first", "2"]
    other = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    shared_units.main(tmp_path, "alone", 1)
    shared_units.main(tmp_path, "second", 2)  # begins when the other process is ready
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    names = ("alone", "first", "second")
    alone, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in names)
    assert first["units"]
    assert second["units"]
    assert sorted(first["units"] + second["units"]) == sorted(alone["units"])
    for name, value in alone["student"].items():
        assert torch.equal(first["student"][name], value)
        assert torch.equal(second["student"][name], value)


@pytest.mark.parametrize(("shares", "phases"), [(3, "weights_then_activations"), (99, "joint")])
def test_shares_put_together_are_the_whole(tmp_path: Path, shares: int, phases: str) -> None:
    x = images(10)
    whole, parts, found = (student_of(resnet8(), x) for _ in range(3))
    module = learn(whole, x, **(PARALLEL | {"phases": phases, "holdout": 0.2}))
    rows = shared(parts, tmp_path, shares, phases=phases, holdout=0.2)
    assert same(whole.student, parts.student)
    assert {row["unit"] for row in rows} == {row["unit"] for row in module.results}
    assert all(q.soft_fraction() == 0.0 for _, q in quantizers_of(parts.student))
    assert not any(p.requires_grad for p in parts.student.parameters())
    assert shared(found, tmp_path, shares, phases=phases, holdout=0.2) == []
    assert same(whole.student, found.student)


def test_a_damaged_share_is_learned_again_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(10)
    whole, parts = student_of(resnet8(), x), student_of(resnet8(), x)
    learn(whole, x, **PARALLEL)
    put, damaged = SampleStore.put, []

    def put_damage_and_die(store: SampleStore, recipe: Any, value: torch.Tensor) -> None:
        put(store, recipe, value)
        if recipe.get("part") == 1:
            damaged.append(store.path(recipe))
            damaged[0].write_bytes(b"cut short")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SampleStore, "put", put_damage_and_die)
        with pytest.raises(KeyboardInterrupt):
            shared(student_of(resnet8(), x), tmp_path, 2)
    assert damaged
    rows = shared(parts, tmp_path, 2)
    assert 0 < len(rows) < 5  # the units of the damaged share alone
    assert same(whole.student, parts.student)


class _Twice(nn.Module):
    """One layer in two units."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.other(self.layer(x)).relu())


def test_what_cannot_be_dealt_out_is_refused(tmp_path: Path) -> None:
    x = images(10)
    with pytest.raises(ValueError, match="schedule=parallel"):
        shared(student_of(resnet8(), x), tmp_path, 2, schedule="sequential")
    with pytest.raises(ValueError, match="share_reconstruction"):
        shared(student_of(resnet8(), x), tmp_path, 0)
    conversion = student_of(_Twice().eval(), torch.randn(8, 4))
    with pytest.raises(ValueError, match="layer in several units"):
        build_reconstruction(conversion=conversion, images=torch.randn(8, 4), share=(0, 2), **PARALLEL)
