"""Every way of making images has a card that names it."""

from __future__ import annotations

import re

import pytest

from tests.configuration import ROOT, options

CARDS = "\n".join(path.read_text() for path in sorted((ROOT / "docs" / "methods").glob("*.md")))
NAMED = set(re.findall(r"`(?:generator=|calibration=)?([a-z0-9_]+)`", CARDS))


@pytest.mark.parametrize("option", options("generator"))
def test_a_card_names_the_generator(option: str) -> None:
    assert option in NAMED


def test_every_card_is_linked_from_the_index_and_names_no_unknown_file() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    linked = set(re.findall(r"\(methods/(\w+)\.md\)", index))
    assert linked == {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
