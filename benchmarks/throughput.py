"""What Calibrant adds to the arithmetic: its steps over bare ones, measured side by side in one run.

    python benchmarks/throughput.py [--threads 2] [--network cifar10_resnet20 resnet18] [--generators dsg zeroq ...]

Synthesis: seconds of a training step of each generator preset over a bare forward and backward (to the pixels) of the
same teacher at the same batch. Reconstruction: seconds of a Trainer's step of a block over a plain loop of the same
forward, loss, backward and Adam on the same unit, with our quantizers, dropping and objective; and of QDrop's over a
loop in which these are plain torch as well. Goals: 1.25 and 1.15. With `--whole n`: the whole reconstruction at n
steps a unit, with the activations between units, over the same loops and nothing else. Rounds alternate between the
two, so that other load on the machine falls on both; the figure is the median over rounds of the ratio of the two.
Rows of what was measured again are replaced.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from benchmarks.plain_torch import PlainStep
from benchmarks.table import read_rows
from callbacks.report import write_csv
from callbacks.run_record import commit, machine
from lightning_modules.job import quieten
from networks.teachers import Teacher
from quantizers.calibrate import calibrate_ranges
from quantizers.convert import convert
from quantizers.qdrop import qdrop

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "throughput.csv"
CASES = {"cifar10_resnet20": 64, "resnet18": 8}  # network -> batch of both loops
LEAST_STEPS = 3
BLOCK = 2  # the unit whose steps are timed: past the first layer

Stage = Callable[[Any, Teacher, int, int], tuple[float, float]]


class StepTimer(pl.Callback):
    """Times the steps of one epoch alone, without what surrounds its loop and without the steps of other units.

    Args:
        epoch: whose steps are timed.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.marks: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.marks.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        """Median time of a step; see `median_interval`."""
        return median_interval(self.marks)


def median_interval(marks: Sequence[float]) -> float:
    """Median time between neighbouring marks, without the first interval, in which memory is still being allocated."""
    return statistics.median(b - a for a, b in list(itertools.pairwise(marks))[1:])


def fit_timed(
    module: pl.LightningModule, datamodule: pl.LightningDataModule | None = None, *, epoch: int = 0, **arguments: Any
) -> float:
    """Seconds a step of `epoch` inside a Trainer."""
    timer = StepTimer(epoch)
    arguments |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(accelerator="cpu", callbacks=[timer], enable_model_summary=False, **arguments).fit(
        module, datamodule=datamodule
    )
    return timer.seconds_per_step


def plain_timed(step: Callable[[], None], steps: int) -> float:
    """Median seconds of a call, taken as in a Trainer: between the ends of two calls, without the first interval."""
    marks = []
    for _ in range(steps):
        step()
        marks.append(time.perf_counter())
    return median_interval(marks)


def synthesis(cfg: Any, teacher: Teacher, batch: int, steps: int) -> tuple[float, float]:
    """Seconds of our step and of a bare one."""
    module = instantiate(cfg.generator)(network=teacher.network, input_size=teacher.input_size, count=batch, seed=0)
    ours = fit_timed(module, max_epochs=1)
    images = torch.randn(batch, *teacher.input_size).requires_grad_()

    def bare() -> None:
        images.grad = None
        teacher.network(images).sum().backward()

    return ours, plain_timed(bare, steps)


def reconstruction(cfg: Any, teacher: Teacher, batch: int, steps: int) -> tuple[float, float]:
    """Seconds of our step and of a plain loop's with our quantizers, on the network's second block."""
    ours, module, cache = reconstruction_step(cfg, teacher, batch)
    return ours, plain_timed(plain_step(cfg, module, cache, BLOCK, batch), steps)


def reconstruction_in_plain_torch(cfg: Any, teacher: Teacher, batch: int, steps: int) -> tuple[float, float]:
    """Seconds of our step and of a loop in which nothing is ours."""
    ours, _, cache = reconstruction_step(cfg, teacher, batch)
    step = PlainStep(
        cache.student_module,
        (cache.student_inputs[0], cache.teacher_inputs[0]),
        cache.targets[0],
        batch_size=cfg.reconstruction.batch_size,
        drop=cfg.reconstruction.drop,
        power=cfg.reconstruction.objective.p,
        biases=cfg.reconstruction.bias_lr is not None,
    )
    return ours, plain_timed(step, steps)


def reconstruction_step(cfg: Any, teacher: Teacher, batch: int) -> tuple[float, Any, Any]:
    """Seconds of our step on one block; a module and its activations at that block, for other loops."""
    images = torch.randn(batch, *teacher.input_size)
    conversion = calibrated(cfg, teacher, images)
    module, datamodule = instantiate(cfg.reconstruction)(conversion=conversion, images=images, seed=0)
    module.epochs = module.epochs[: BLOCK + 1]
    arguments = module.trainer_arguments() | {"max_epochs": BLOCK + 1}
    ours = fit_timed(module, datamodule, epoch=BLOCK, **arguments)
    module, cache = opened(cfg, conversion, images)
    module.enter(BLOCK, cache)
    return ours, module, cache


def calibrated(cfg: Any, teacher: Teacher, images: Tensor) -> Any:
    """The student before reconstruction."""
    parts = [instantiate(cfg[name]) for name in ("protocol", "weight", "activation", "bits")]
    conversion = convert(teacher.network, teacher.example(), *parts)
    calibrate_ranges(conversion.student, images, len(images))
    return conversion


def opened(cfg: Any, conversion: Any, images: Tensor) -> tuple[Any, Any]:
    """A module that no Trainer trains, and its activations."""
    module, datamodule = instantiate(cfg.reconstruction)(conversion=conversion, images=images, seed=0)
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)  # for its world size
    return module, datamodule.open_cache(module)


def plain_step(cfg: Any, module: Any, cache: Any, epoch: int, count: int) -> Callable[[], None]:
    """One step on the unit that was entered."""
    learnables = module.learnables[module.epochs[epoch].unit]
    groups = [{"params": g["params"], "lr": g["lr"]} for g in learnables.groups(module.epochs[epoch].phase)]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups)
    index = torch.arange(cfg.reconstruction.batch_size) % count
    unit, generator = cache.student_module, torch.Generator()

    def step() -> None:
        inputs = [x[index] for x in cache.student_inputs]
        if module.drop:
            floats = [x[index] for x in cache.teacher_inputs]
            inputs = [qdrop(q, x, module.drop, generator) for q, x in zip(inputs, floats, strict=True)]
        error = module.loss.objective.errors(cache, unit(*inputs), index).mean()
        loss = error + 0.1 * learnables.regularizer(0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def whole_network(cfg: Any, teacher: Teacher, batch: int, steps: int) -> tuple[float, float]:
    """Seconds a step over all units, activations between them and measurements included, and of bare loops alone."""
    images = torch.randn(batch, *teacher.input_size)
    conversion = calibrated(cfg, teacher, images)
    module, datamodule = instantiate(cfg.reconstruction)(conversion=conversion, images=images, seed=0)
    total = sum(epoch.iterations for epoch in module.epochs)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **module.trainer_arguments())
    begin = time.perf_counter()
    trainer.fit(module, datamodule=datamodule)
    ours = time.perf_counter() - begin
    module, cache = opened(cfg, calibrated(cfg, teacher, images), images)
    bare = 0.0
    for index, epoch in enumerate(module.epochs):
        module.enter(index, cache)
        step = plain_step(cfg, module, cache, index, len(images))
        begin = time.perf_counter()
        for _ in range(epoch.iterations):
            step()
        bare += time.perf_counter() - begin
    return ours / total, bare / total


def composed(network: str, generator: str, learned: str, options: argparse.Namespace) -> Any:
    """The configuration of a case: random weights, few steps, few noise images, the batch of the bare loop.

    `learned` is `reconstruction=<option>` or `pipeline=<option>`.
    """
    overrides = [f"model={network}", "model.pretrained=false", f"generator={generator}"]
    overrides += [f"generator.batch_size={CASES[network]}", f"generator.steps={options.steps}"]
    overrides += [learned, f"reconstruction.iterations={options.steps}"]
    if generator.startswith("dsg"):
        overrides += ["generator.slack.images=8", "generator.lse=false"]  # LSE ties the batch to the layers
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=overrides)


def measure(network: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each generator and each way to learn, two in plain torch, and of the whole if asked."""
    batch = CASES[network]
    cases: list[tuple[str, str, Stage, float | str]] = [
        ("synthesis", name, synthesis, 1.25) for name in options.generators
    ]
    cases += [("reconstruction", learned, reconstruction, 1.15) for learned in options.reconstruction]
    plain = "reconstruction=qdrop", "pipeline=calibrant_fast"
    cases += [("reconstruction, all plain", learned, reconstruction_in_plain_torch, 1.15) for learned in plain]
    if options.whole:
        cases += [("whole network", learned, whole_network, "") for learned in options.reconstruction]
    for stage, preset, function, goal in cases:
        made = stage == "synthesis"
        generator, learned = (preset, "reconstruction=none") if made else ("zeroq", preset)
        cfg = composed(network, generator, learned, options)
        steps = options.steps
        if stage == "whole network":
            steps = cfg.reconstruction.iterations = options.whole
        teacher: Teacher = instantiate(cfg.model)
        pairs = [function(cfg, teacher, batch, steps) for _ in range(options.rounds)]
        ours, bare = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        size, name = batch if made else cfg.reconstruction.batch_size, preset.removeprefix("reconstruction=")
        asked = f" (goal {goal})" if goal else ""
        print(
            f"{network:18} {stage:25} {name:24} ratio {ratio:.3f}{asked}  ours {ours:.4f} s  bare {bare:.4f} s",
            flush=True,
        )
        yield {
            "network": network, "stage": stage, "preset": name, "batch": size, "ratio": round(ratio, 3),
            "goal": goal,
            "seconds_per_step": round(ours, 5), "bare_seconds_per_step": round(bare, 5), "steps": steps,
            "rounds": options.rounds, "machine": machine(), "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
        }  # fmt: skip


def keep(row: dict[str, Any], path: Path = RESULTS) -> None:
    """Write the row at once, in place of that of the same case: hours of others do not hang on the next."""
    case = "network", "stage", "preset"
    rows = [*(old for old in read_rows(path) if any(old[key] != row[key] for key in case)), row]
    columns = dict.fromkeys(key for each in (row, *rows) for key in each)  # older rows may lack some
    write_csv(path, [{key: each.get(key, "") for key in columns} for each in rows])


def main() -> None:
    """Measure, print, and replace the rows of the same cases in benchmarks/results/throughput.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument(
        "--generators", nargs="*", default=["dsg"], help="options of conf/generator; none: no synthesis"
    )
    learned = ["reconstruction=brecq", "pipeline=calibrant", "pipeline=calibrant_fast"]
    parser.add_argument(
        "--reconstruction", nargs="+", default=learned, help="options of conf/reconstruction, conf/pipeline"
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--whole", type=int, default=0, help="steps a unit of the whole reconstruction; 0 leaves it out"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.steps < LEAST_STEPS:
        parser.error(
            f"--steps: expected at least {LEAST_STEPS}, the first interval does not count; got {options.steps}"
        )
    torch.set_num_threads(options.threads)
    quieten()
    logging.getLogger("reconstruction").setLevel(logging.ERROR)  # so few steps decide nothing
    for network in options.network:
        for row in measure(network, options):
            keep(row)


if __name__ == "__main__":
    main()
