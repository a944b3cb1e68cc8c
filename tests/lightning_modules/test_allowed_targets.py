"""A run's folder from somebody else runs no code: not as a student, nor to evaluate, resume or repeat it."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_modules.allowed_targets import STUDENT, expect_allowed, named_in_conf, student_parts
from lightning_modules.repeated_runs import repeat
from lightning_modules.saved_students import load_student_from
from run import run_job
from tests.configuration import CONF, SMALL, composed, options
from tests.lightning_modules.canaries import evil_configurations, pickled

QUICK = [*SMALL, "calibration=noise", "reconstruction=none"]
REFUSED = "expected a part of calibrant|no such part of this calibrant|is computed, or may be, by|library load a file"
NAMES = sorted(evil_configurations(Path("evil"), Path("sign")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_job(composed(QUICK, folder))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A run's folder to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "theirs"))


@pytest.fixture
def resolver() -> Iterator[None]:
    """As many programs have: one that calls what it is given."""
    OmegaConf.register_new_resolver("canary", lambda path: Path(path).mkdir())
    yield
    OmegaConf.clear_resolver("canary")


def changed(folder: Path, values: dict[str, Any]) -> Path:
    """The folder with other values in its configuration, and a record that fits."""
    path = folder / ".hydra" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    for key, value in values.items():
        *above, last = key.split(".")
        group = content
        for name in above:
            group = group[name]
        group[last] = value
    path.write_text(yaml.safe_dump(content))
    facts = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(facts | {"config": content}))
    return folder


def gone_on(key: str) -> Callable[[Path], object]:
    """Runs the main job with `evaluate` or `resume`, in a folder of its own."""

    def run(folder: Path) -> object:
        cfg = copy.deepcopy(defaults())
        cfg.paths.output, cfg[key] = str(folder.parent / "own"), str(folder)
        return run_job(cfg)

    return run


@cache
def defaults() -> DictConfig:
    return composed(SMALL)


USES: dict[str, Callable[[Path], object]] = {
    "load_student_from": load_student_from,
    "evaluate": gone_on("evaluate"),
    "resume": gone_on("resume"),
    "verify": lambda folder: repeat(folder, folder.parent / "again", run_job),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("resolver")
def test_no_code_of_a_foreign_folder_runs(
    name: str, use: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = tmp_path / "sign"
    monkeypatch.setenv("CANARY", "os.mkdir")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)  # which the job sets where it is imported
    changed(folder, evil_configurations(pickled(tmp_path / "evil.pt", sign), sign)[name])
    with pytest.raises(ValueError, match=REFUSED) as raised:
        USES[use](folder)
    assert not sign.exists()
    assert str(folder) in str(raised.value)


def test_the_canary_sings(tmp_path: Path) -> None:
    evil = pickled(tmp_path / "evil.pt", tmp_path / "sign")
    pickle.loads(evil.read_bytes())
    assert (tmp_path / "sign").exists()


@pytest.mark.parametrize("name", ["student.safetensors", "record.json", "allocation.yaml", ".hydra/config.yaml"])
def test_pickled_files_are_not_unpickled(name: str, folder: Path, tmp_path: Path) -> None:
    pickled(folder / name, tmp_path / "sign")
    with pytest.raises(ValueError, match=Path(name).name):
        load_student_from(folder)
    assert not (tmp_path / "sign").exists()


def test_a_pickled_checkpoint_is_not_unpickled_when_a_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    cfg = composed([*SMALL, "calibration=noise"], folder)
    (folder / "checkpoints").mkdir()
    pickled(folder / "checkpoints" / "reconstruction.ckpt", tmp_path / "sign")
    cfg.resume = str(folder)
    with pytest.raises(pickle.UnpicklingError, match="weights"):
        run_job(cfg)
    assert not (tmp_path / "sign").exists()


def test_the_message_names_key_target_and_remedy(folder: Path) -> None:
    changed(folder, {"weight.range": {"_target_": "mine.Range"}})
    pattern = r"folder: .*config\.yaml: weight\.range\._target_ names 'mine\.Range'; .* set CALIBRANT_TRUST=mine;"
    with pytest.raises(ValueError, match=pattern):
        load_student_from(folder)
    changed(folder, {"weight.range": {"_target_": "quantizers.to_come.Range"}})
    with pytest.raises(ValueError, match=r"'quantizers\.to_come\.Range', .* pip install --upgrade calibrant"):
        load_student_from(folder)


def test_code_of_ones_own_is_named_in_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "calibrant_extra").mkdir()
    (tmp_path / "calibrant_extra" / "__init__.py").write_text("from quantizers.ranges import MinMax as Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    changed(folder, {"activation.range": {"_target_": "calibrant_extra.Mine"}})
    for use in ("load_student_from", "evaluate"):
        with pytest.raises(ValueError, match="set CALIBRANT_TRUST=calibrant_extra;"):
            USES[use](folder)
    assert "calibrant_extra" not in sys.modules
    monkeypatch.setenv("CALIBRANT_TRUST", "another, calibrant_extra")
    load_student_from(folder)
    assert gone_on("evaluate")(folder)
    monkeypatch.setenv("CALIBRANT_TRUST", "calibrant_missing,quantizers,calibrant")
    changed(folder, {"activation.range": {"_target_": "calibrant_missing.Mine"}})
    with pytest.raises(ValueError, match="listed there, but not importable here"):
        load_student_from(folder)
    changed(folder, {"activation.range": {"_target_": "quantizers.ranges.torch.load"}})
    with pytest.raises(ValueError, match="no such part of this calibrant"):
        load_student_from(folder)


FILES = sorted(str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml") if "hydra" not in path.parts)


@pytest.mark.parametrize("name", FILES)
def test_every_yaml_of_conf_is_allowed(name: str) -> None:
    cfg = OmegaConf.load(CONF / name)
    for key in ("defaults", "hydra"):  # neither is in what Hydra saves of a run
        cfg.pop(key, None)
    expect_allowed(cfg, CONF / name, "conf")


@pytest.mark.parametrize("part", sorted({*STUDENT} - {"corrections"}))
def test_every_option_makes_a_student(part: str) -> None:
    for option in options(part):
        cfg = composed([*SMALL, f"{part}={option}"])
        assert student_parts(cfg, Path("config.yaml"), "folder")[part] == OmegaConf.to_container(
            cfg[part], resolve=True
        )


def test_every_correction_makes_a_student() -> None:
    for option in options("corrections"):
        parts = student_parts(composed([f"corrections={option}"]), Path("config.yaml"), "folder")
        assert set(instantiate(parts["corrections"], _convert_="all")) == set(parts["corrections"])


def test_the_list_of_conf_is_short_outside_this_package() -> None:
    ours = {path.name for path in CONF.parent.iterdir() if (path / "__init__.py").exists()} | {"hydra_plugins"}
    assert {name for name in named_in_conf() if name.partition(".")[0] not in ours} == {
        "pytorch_lightning.loggers.CSVLogger",
        "pytorch_lightning.loggers.TensorBoardLogger",
        "torch.optim.Adam",
        "torch.optim.SGD",
        "torch.optim.lr_scheduler.ReduceLROnPlateau",
    }
