"""Run a sweep and write its finished jobs to `benchmarks/results/<name>.csv`, one row a run.

    python benchmarks/table.py cifar10 -- experiment=cifar10_resnet20_dsg_w4a4 sweep=cifar10
    python benchmarks/table.py calibration_cifar10 --plan -- seed=0,1,2  a sweep a line of benchmarks/plans/<name>.txt
    python benchmarks/table.py cifar10 --collect multirun/<folder>       rows of a sweep that has already run

What stands after `--` goes to `run.py`. Rows that the file holds of the same command and seed are replaced. A plan may
be dealt to several processes, `--part 1/2` and `--part 2/2`; the rows of each of its lines are added when that has run.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from callbacks.report import flat, write_csv

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IDENTITY = (
    "network",
    "protocol",
    "w_bits",
    "a_bits",
    "images",
    "image_count",
    "pipeline",
    "recipe",
    "allocation",
    "hardware",
    "distillation",
    "seed",
    "weight",
    "activation",
    "corrections",
    "test_images",
)
PLACES = ("paths.", "logger.", "show.", "data.root", "hydra.", "hydra/", "callbacks.", "export.")
ASIDE = ("data", "paths", "logger", "callbacks", "export", "hydra", "experiment", "sweep", "debug", "local")
ELSEWHERE = (  # what has a column of its own, says where files are, or changes no number
    "bits.weight",
    "bits.activation",
    "calibration.count",
    "calibration.root",
    "model.name",
    "model.checkpoint",
    "model.obtain",
    "model.stated_top1",
    "reconstruction.forward_batch_size",
    "reconstruction.residency",
    "trainer.accelerator",
    "trainer.log_every_n_steps",
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def collect(folder: Path) -> list[dict[str, Any]]:
    """The rows of all finished runs below `folder`; failed ones are named on the standard error stream."""
    rows = []
    for path in sorted(folder.glob("**/record.json")):
        facts = json.loads(path.read_text())
        if facts["status"] == "finished":
            rows.append(facts["row"] | {"changes": changes(facts), "overrides": spelled(facts["overrides"])})
        else:
            print(f"left out: {path.parent.name}: {facts.get('error', facts['status'])}", file=sys.stderr)
    return rows


def spelled(overrides: list[str]) -> str:
    """What a run's command line asks for beyond the options that have a column of their own, and beyond places."""
    asked = (o for o in overrides if not o.startswith(PLACES) and (set("./") & set(o.split("=")[0]) or unusual(o)))
    return " ".join(sorted(brief(o) for o in asked))


def brief(setting: str) -> str:
    """A setting without spaces, and of a path in it the last part: where files lie on one machine helps nobody."""
    key, _, value = setting.replace(" ", "").partition("=")
    return f"{key}={Path(value).name}" if value.startswith(("/", "~")) else f"{key}={value}"


def unusual(override: str) -> bool:
    """Whether it chooses calibration images of a kind that the columns `images` and `image_count` do not tell."""
    group, _, option = override.partition("=")
    return group == "calibration" and re.fullmatch(r"(synthetic|real|noise|none)(_\d+)?", option) is None


def changes(facts: dict[str, Any]) -> str:
    """Every setting in which a run differs from the options it chose, whether an experiment or the command line set it.

    An option that is no longer there cannot be compared with: then only what the command line says.
    """
    config = facts["config"]
    choices = facts["choices"]
    if config.get("corrections"):  # Hydra names no choice where there is a list of them
        choices = {"corrections": f"[{','.join(config['corrections'])}]"} | choices
    groups = [g for g in config if choices.get(g) not in (None, "None") and g not in ASIDE]
    if facts["images"]["origin"] != "synthetic" and "generator" in groups:
        groups.remove("generator")
    try:
        defaults = options(*(f"{group}={choices[group]}" for group in groups))
    except HydraException:
        return spelled(facts["overrides"])
    found = [o for o in (f"calibration={choices.get('calibration')}",) if "calibration" in groups and unusual(o)]
    run = OmegaConf.create(config)
    for group in groups:
        run[group] = defaults[group]  # in its place, for what it takes from elsewhere (`${model.mean}`)
        default = flat(DictConfig(OmegaConf.to_container(run[group], resolve=True)), f"{group}.")
        run[group] = config[group]
        chosen = flat(DictConfig(config[group]), f"{group}.")
        keys = [key for key in {**default, **chosen} if key not in ELSEWHERE]
        found += [f"{key}={chosen.get(key, '(absent)')}" for key in keys if default.get(key) != chosen.get(key)]
    return " ".join(sorted(brief(setting) for setting in found))


@functools.cache
def options(*choices: str) -> DictConfig:
    """The configuration of these options as their files have them."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(choices))


def replaces(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether `new` measures again what `old` did: the same columns, asked for by the same experiment and overrides.

    Not the same configuration: after a change of defaults the same command replaces its rows. Other overrides that come
    to the same `changes` replace them as well: what once had to be said is an option's default now. Rows from before
    `experiment` was a column agree with any, and say in `changes` what their command line set.
    """

    def text(row: dict[str, Any], key: str) -> str:
        value = row.get(key)
        return "none" if value in (None, "") else str(value)

    if any(text(new, key) != text(old, key) for key in IDENTITY):
        return False
    if old.get("experiment"):
        settled = bool(old.get("changes")) and new.get("changes") == old["changes"]
        return text(new, "experiment") == text(old, "experiment") and (
            settled or text(new, "overrides") == text(old, "overrides")
        )
    settings = [o for o in (new.get("overrides") or "").split() if "." in o.split("=")[0]]
    return settings == (old.get("changes") or "").split()


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`new` after those of `old` that are not measured again; columns that a row lacks stay empty."""
    kept = [row for row in old if not any(replaces(again, row) for again in new)]
    columns = list(dict.fromkeys(key for row in (*kept, *new) for key in row))
    return [{key: row.get(key, "") for key in columns} for row in (*kept, *new)]


def planned(text: str, part: tuple[int, int] = (1, 1)) -> list[list[str]]:
    """The sweeps of a plan, one a line, as lists of overrides; of `(i, n)` parts the i-th. `#` starts a comment."""
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    i, n = part
    return [line for line in lines if line][i - 1 :: n]


def part(text: str) -> tuple[int, int]:
    """`i/n` as two numbers, 1 to n."""
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"expected i/n with 1 <= i <= n, such as 1/2, got {text!r}")
    return int(i), int(n)


def sweep(overrides: list[str], folder: Path) -> int:
    """Run `run.py` with these arguments below `folder`; its exit status."""
    command = [sys.executable, str(ROOT / "run.py"), *overrides, f"hydra.sweep.dir={folder}"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def add(name: str, rows: list[dict[str, Any]]) -> None:
    """Put rows into a results file, also where other processes do the same."""
    path = RESULTS / f"{name}.csv"
    with FileLock(Path(tempfile.gettempdir()) / f"calibrant-results-{name}.lock"):
        write_csv(path, merge(read_rows(path), rows))
    print(f"{len(rows)} rows -> {path.relative_to(ROOT)}")


def arguments(line: list[str]) -> argparse.Namespace:
    """The command line; what stands behind `--` is split off first: after options argparse would not take it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="benchmarks/results/<name>.csv is written")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--collect", type=Path, help="folder of a sweep that has already run")
    source.add_argument("--plan", action="store_true", help="run the sweeps of benchmarks/plans/<name>.txt")
    parser.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="of a plan: the i-th of n parts")
    split = line.index("--") if "--" in line else len(line)
    return parser.parse_args(line[:split], argparse.Namespace(overrides=line[split + 1 :]))


def main() -> None:
    """Run the sweeps, collect, write."""
    options = arguments(sys.argv[1:])
    if options.collect is not None:
        rows = collect(options.collect)
        if not rows:
            raise SystemExit(f"no finished run below {options.collect}")
        add(options.name, rows)
        return
    sweeps = [options.overrides]
    if options.plan:
        plan = (ROOT / "benchmarks" / "plans" / f"{options.name}.txt").read_text()
        sweeps = [["-m", *line, *options.overrides] for line in planned(plan, options.part)]
    folder, failed = ROOT / "multirun" / f"{options.name}_{datetime.now(UTC):%Y-%m-%d_%H-%M-%S}_{os.getpid()}", 0
    for i, overrides in enumerate(sweeps):
        failed = max(failed, sweep(overrides, folder / str(i)))
        if rows := collect(folder / str(i)):
            add(options.name, rows)
        else:
            print(f"no finished run below {folder / str(i)}", file=sys.stderr)
            failed = failed or 1
    sys.exit(failed)


if __name__ == "__main__":
    main()
