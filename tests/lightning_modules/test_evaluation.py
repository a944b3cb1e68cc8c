"""EvaluationModule against a plain loop over the images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.evaluation import EvaluationModule


class Counting(nn.Module):
    """A linear network that counts its calls."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(12, classes, bias=False)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, generator=generator)
        self.calls = 0
        self.was_training = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.was_training |= self.training
        return self.linear(x.flatten(1))


@pytest.fixture
def score(tmp_path: Path) -> Callable[[EvaluationModule, DataLoader], dict[str, float]]:
    def run(module: EvaluationModule, loader: DataLoader) -> dict[str, float]:
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        return dict(trainer.test(module, loader, verbose=False)[0])

    return run


def data(classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 3, 2, 2, generator=generator)
    return x, torch.randint(classes, (37,), generator=generator)


def plain(network: nn.Module, reference: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """One image at a time, in double precision, with Python arithmetic."""
    totals = dict.fromkeys(("top1", "top5", "loss", "agreement", "kl"), 0.0)
    for image, label in zip(x, y.tolist(), strict=True):
        logits, expected = (n(image[None])[0].double() for n in (network, reference))
        p, q = torch.softmax(logits, 0), torch.softmax(expected, 0)
        order = sorted(range(len(p)), key=lambda k: -logits[k].item())
        totals["top1"] += 100 * (order[0] == label)
        totals["top5"] += 100 * (label in order[:5])
        totals["loss"] -= torch.log(p[label]).item()
        totals["agreement"] += 100 * (order[0] == int(expected.argmax()))
        totals["kl"] += sum((q[k] * torch.log(q[k] / p[k])).item() for k in range(len(p)))
    return {key: value / len(x) for key, value in totals.items()}


@pytest.mark.parametrize("classes", [3, 7])
def test_equals_a_plain_loop(classes: int, score: Callable[..., dict[str, float]]):
    networks = {name: Counting(classes, seed) for seed, name in enumerate(("teacher", "student", "other"))}
    x, y = data(classes)
    got = score(EvaluationModule(networks, "teacher"), DataLoader(TensorDataset(x, y), batch_size=10))
    names = ["top1", "loss"] + (["top5"] if classes >= 5 else [])
    assert [network.calls for network in networks.values()] == [4, 4, 4]
    assert not any(network.was_training for network in networks.values())
    expected = {}
    with torch.no_grad():
        for name, network in networks.items():
            measured = plain(network, networks["teacher"], x, y)
            compared = [] if name == "teacher" else ["agreement", "kl"]
            expected |= {f"test/{name}/{metric}": measured[metric] for metric in [*names, *compared]}
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_a_second_pass_starts_from_nothing(score: Callable[..., dict[str, float]]):
    module = EvaluationModule({"teacher": Counting(6, 0), "student": Counting(6, 1)}, "teacher")
    x, y = data(6)
    first = score(module, DataLoader(TensorDataset(x[:20], y[:20]), batch_size=8))
    whole = score(module, DataLoader(TensorDataset(x, y), batch_size=8))
    assert score(module, DataLoader(TensorDataset(x[:20], y[:20]), batch_size=8)) == first != whole


def test_a_copy_of_the_reference_agrees_entirely(score: Callable[..., dict[str, float]]):
    module = EvaluationModule({"teacher": Counting(6, 0), "student": Counting(6, 0)}, "teacher")
    x, y = data(6)
    got = score(module, DataLoader(TensorDataset(x, y), batch_size=8))
    assert got["test/student/agreement"] == 100.0
    assert got["test/student/kl"] == 0.0
    assert got["test/student/top1"] == got["test/teacher/top1"]


def test_bad_names_are_refused():
    with pytest.raises(ValueError, match="reference: expected one of student"):
        EvaluationModule({"student": Counting(3, 0)}, "teacher")
    for name in ("a.b", "a/b", "float 2"):
        with pytest.raises(ValueError, match="networks: expected"):
            EvaluationModule({name: Counting(3, 0)}, name)


@pytest.mark.parametrize("classes", [3, 7])
def test_known_answers_of_the_reference_give_the_same_bits(classes: int, score: Callable[..., dict[str, float]]):
    networks = {name: Counting(classes, seed) for seed, name in enumerate(("teacher", "student"))}
    loader = DataLoader(TensorDataset(*data(classes)), batch_size=10)
    module = EvaluationModule(networks, "teacher")
    measured = score(module, loader)
    calls = networks["teacher"].calls
    again = EvaluationModule(networks, "teacher", known=module.answered)
    assert score(again, loader) == score(again, loader) == measured
    assert networks["teacher"].calls == calls
    assert torch.equal(again.answered, module.answered)
    with torch.no_grad():
        torch.testing.assert_close(module.answered, networks["teacher"](data(classes)[0]))
