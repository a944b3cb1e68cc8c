"""Score image sets against a network's stored statistics: are synthetic images as unlike each other as real ones?

    python benchmarks/homogenisation.py --generators zeroq dsg -- model=cifar10_resnet20 calibration.count=128

Takes the images of each generator (from the store, where `run.py` puts and finds them too, or made now) and as many
real ones, and runs `trainer.validate` of `BNAlignmentModule` on all sets. Writes
benchmarks/results/homogenisation_<model>.csv, a row for each set and layer, and a picture beside it. What stands after
`--` are overrides of `run.py`.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.alignment_plot import AlignmentPlot
from callbacks.report import write_csv
from callbacks.run_record import commit
from lightning_modules.bn_alignment import INPUT, BNAlignmentModule
from lightning_modules.job import open_job
from lightning_modules.stored_synthesis import synthesizer
from networks.teachers import Teacher
from synthesis.moments import Probe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OUTPUTS = ROOT / "outputs" / "homogenisation"


def composed(overrides: list[str], name: str) -> DictConfig:
    """The configuration of `run.py` with these overrides; what a run leaves goes to a folder of that name."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["logger=none", *overrides])
    with open_dict(cfg):
        cfg.paths.output = str(OUTPUTS / name)
    return cfg


def images_of_run(cfg: DictConfig) -> Tensor:
    """The calibration images that `run.py` would take."""
    with open_job(cfg) as job:
        teacher: Teacher = instantiate(cfg.model)
        images = job.source.load(teacher, job.ledger, synthesizer(job, teacher)).images
        job.forget_checkpoints()
    return images


def image_sets(generators: list[str], overrides: list[str]) -> dict[str, Tensor]:
    """Real images, and those of each generator, as many of each."""
    sets = {"real": images_of_run(composed([*overrides, "calibration=real"], "real"))}
    for name in generators:
        sets[name] = images_of_run(composed([*overrides, f"generator={name}"], name))
    return sets


def main() -> None:
    """Make the sets, score them, write csv and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", nargs="+", default=["noise", "zeroq", "dsg"], help="options of conf/generator")
    parser.add_argument("overrides", nargs="*", help="arguments of run.py, after --")
    options = parser.parse_args()
    cfg = composed(options.overrides, "scores")
    sets = image_sets(options.generators, options.overrides)
    teacher: Teacher = instantiate(cfg.model)
    module = BNAlignmentModule(teacher.network, teacher.input_size, probe=Probe("sample"))
    path = RESULTS / f"homogenisation_{teacher.name}"
    plot = AlignmentPlot(list(sets), path.with_suffix(".png"), mean=teacher.mean, std=teacher.std)
    loaders = [DataLoader(list(images), batch_size=cfg.batch_size) for images in sets.values()]  # type: ignore[arg-type]
    trainer = pl.Trainer(logger=False, callbacks=[plot], enable_model_summary=False, enable_progress_bar=False)
    trainer.validate(module, loaders, verbose=False)
    facts = {"seed": cfg.seed, "commit": commit(), "date": datetime.now(UTC).date().isoformat()}
    rows = []
    for index, (name, images) in enumerate(sets.items()):
        diversity = module.diversities[index]
        for layer, row in zip([*module.layers, INPUT], diversity.compute(), strict=True):
            values = {key: round(value, 5) for key, value in row._asdict().items()}
            rows.append(
                {"network": teacher.name, "images": name, "image_count": len(images), "layer": layer, **values, **facts}
            )
        means = torch.tensor(diversity.compute())[:-1].mean(0).tolist()
        print(
            f"{name:24} spread of means {means[0]:.3f}  of deviations {means[1]:.3f}  likeness {means[2]:.3f}  "
            f"of features {diversity.feature_similarity():.3f}"
        )
    write_csv(path.with_suffix(".csv"), rows)


if __name__ == "__main__":
    main()
