"""What a stored result is called: by what its options say beside the defaults."""

from __future__ import annotations

import pytest
from omegaconf import open_dict

from lightning_modules.saved_runs import plain, stated
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
