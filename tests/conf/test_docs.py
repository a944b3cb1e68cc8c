"""Every way of making images has a card that names it, and every card says what a card has to say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.configuration import ROOT, options

CARDS = "\n".join(path.read_text() for path in sorted((ROOT / "docs" / "methods").glob("*.md")))
NAMED = set(re.findall(r"`(?:generator=|calibration=)?([a-z0-9_]+)`", CARDS))


@pytest.mark.parametrize("card", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda path: path.stem)
def test_a_card_has_an_equation_its_defaults_and_where_it_differs(card: Path) -> None:
    text = card.read_text()
    assert re.search(r"^    \S.*[=+]", text, re.MULTILINE), "no indented equation"
    assert "\n**Defaults**" in text
    assert "\n**Differs from" in text or re.search(r"^Ours\b", text, re.MULTILINE)


@pytest.mark.parametrize("option", options("generator"))
def test_a_card_names_the_generator(option: str) -> None:
    assert option in NAMED


def test_every_card_is_linked_from_the_index_and_names_no_unknown_file() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    linked = set(re.findall(r"\(methods/(\w+)\.md\)", index))
    assert linked == {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
