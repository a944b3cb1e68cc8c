"""What a stored result is called: by what its options say beside the defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig, open_dict

from callbacks.run_record import config_hash
from lightning_modules.saved_runs import origin, plain, saved_configuration, stated
from tests.configuration import composed, options


@pytest.mark.parametrize("option", options("generator"))
def test_options_that_are_left_out_or_off_do_not_name_a_result(option: str) -> None:
    cfg = composed([f"generator={option}"]).generator
    found = stated(plain(cfg))
    with open_dict(cfg):
        for name in ("early_stop", "compile", "channels_last"):
            del cfg[name]
        cfg.option_to_come = None
    assert stated(plain(cfg)) == found
    assert {"_target_", "steps", "source"} <= found.keys()


def test_what_is_set_names_the_result() -> None:
    names = [
        stated(plain(composed(["generator=dsg", override]).generator))
        for override in ("seed=0", "generator.lse=false", "generator.sci=true", "generator.compile=true")
    ]
    assert all(names.count(name) == 1 for name in names)
    assert names[1]["lse"] is False
    assert stated({"steps": 0, "input_weight": 0.0, "view": None, "priors": {}}) == {"steps": 0, "input_weight": 0.0}


def test_a_run_that_goes_on_in_its_own_folder_has_the_given_configuration_which_must_be_the_recorded_one(
    tmp_path: Path,
) -> None:
    cfg = composed(["bits=w2a4"], tmp_path)
    recorded = {"config_hash": config_hash(plain(cfg, resolve=False))}
    (tmp_path / "record.json").write_text(json.dumps(recorded))
    cfg.resume = str(tmp_path)
    assert saved_configuration(cfg) == (cfg, tmp_path)
    cfg.seed = 1
    with pytest.raises(ValueError, match=r"resume: .* holds a run of another configuration"):
        saved_configuration(cfg)


def test_how_a_sweep_is_run_changes_no_hash() -> None:
    one, other = (plain(composed([f"sweep.resume={value}"]), resolve=False) for value in ("true", "false"))
    assert config_hash(one) == config_hash(other)


def saved(tmp_path: Path, key: str, folder: str = "theirs") -> tuple[DictConfig, Path]:
    """A configuration that goes on with a run, whose folder holds its configuration and an empty record."""
    composed(["bits=w2a4", "seed=7"], tmp_path / folder)
    (tmp_path / folder / "record.json").write_text("{}")
    cfg = composed([], tmp_path / "own")
    cfg[key] = str(tmp_path / folder)
    return cfg, tmp_path / folder


@pytest.mark.parametrize("key", ["evaluate", "resume"])
def test_the_saved_configuration_is_used(key: str, tmp_path: Path) -> None:
    cfg, folder = saved(tmp_path, key)
    found, output = saved_configuration(cfg)
    assert (found.seed, found.bits.weight, found[key]) == (7, 2, str(folder))
    assert output == (folder if key == "resume" else tmp_path / "own") == Path(found.paths.output)


@pytest.mark.parametrize("key", ["evaluate", "resume"])
@pytest.mark.parametrize("content", [b"a: [1", bytes(range(128, 256)), b"", b"[1]", b"word", b"model: {a: ${", b"a: 1"])
def test_a_corrupt_configuration_is_named(content: bytes, key: str, tmp_path: Path) -> None:
    cfg, folder = saved(tmp_path, key)
    (folder / ".hydra" / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{key}: .*{folder}.*config\.yaml.*once more") as raised:
        saved_configuration(cfg)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["evaluate", "resume"])
@pytest.mark.parametrize("content", [b"{", bytes(range(128, 256)), b"[1]", b'"word"', b""])
def test_a_corrupt_record_is_named(content: bytes, key: str, tmp_path: Path) -> None:
    cfg, folder = saved(tmp_path, key)
    (folder / "record.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^record: .*theirs.*record\.json"):
        origin(cfg)
    cfg[key], cfg.resume = None, str(folder)
    cfg.paths.output = str(folder)
    with pytest.raises(ValueError, match=r"^record: .*theirs.*record\.json"):
        saved_configuration(cfg)
