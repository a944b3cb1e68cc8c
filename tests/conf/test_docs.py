"""Every method has a card or page that names it, all of them are linked, and what they say of the options is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tests.configuration import CONF, ROOT, composed, options

DOCS = ROOT / "docs"
CARDS = {path.stem for path in (DOCS / "methods").glob("*.md")}
PAGES = {path.stem for path in DOCS.glob("*.md")} - {"index"}
DOCUMENTED = (
    "pipeline", "generator", "weight", "activation", "reconstruction", "reconstruction/objective", "corrections",
    "distillation", "protocol", "allocation", "hardware",
)  # fmt: skip
TEXT = "\n".join(path.read_text() for path in sorted(DOCS.rglob("*.md")) if path.stem not in ("index", "results"))
SPANS = re.findall(r"`([^`\n]+)`", TEXT)  # `dsg`, `generator=dsg`, `weight=gptq reconstruction=closed_form`
NAMED = {word.rpartition("=")[2] for span in SPANS for word in span.split()}
FIELDS = ["placement", "first_weight", "last_weight", "image", "first_output", "last_input"]
PROTOCOLS = (DOCS / "protocols.md").read_text()


@pytest.mark.parametrize("card", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda path: path.stem)
def test_a_card_has_an_equation_its_defaults_and_where_it_differs(card: Path) -> None:
    text = card.read_text()
    assert re.search(r"^    \S.*[=+]", text, re.MULTILINE), "no indented equation"
    assert "\n**Defaults**" in text
    assert "\n**Differs from" in text or re.search(r"^Ours\b", text, re.MULTILINE)


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in DOCUMENTED for option in options(group)])
def test_a_card_names_the_option(group: str, option: str) -> None:
    if option == "none":  # a word of other groups too
        assert any(f"{group}={option}" in span.split() for span in SPANS)
    assert option in NAMED


def test_every_card_and_page_is_linked_from_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    assert set(re.findall(r"\(methods/(\w+)\.md\)", index)) == CARDS
    assert set(re.findall(r"\((\w+)\.md\)", index)) == PAGES


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("protocol", options("protocol"))
def test_the_table_of_protocols_says_what_the_options_do(protocol: str, field: str) -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PROTOCOLS.splitlines() if "|" in line]
    column = rows[0].index(f"`{protocol}`")
    (row,) = [row for row in rows if row[0].startswith(f"`{field}`")]
    value = OmegaConf.load(CONF / "protocol" / f"{protocol}.yaml")[field]
    missing = "float" if field == "image" else "job"
    assert row[column].strip("`") == (missing if value is None else str(value))


def commands() -> list[str]:
    """Every call of run.py in README and docs that can be composed as it stands, continued lines joined."""
    text = (ROOT / "README.md").read_text() + TEXT + (DOCS / "index.md").read_text()
    lines = text.replace("\\\n", " ").splitlines()
    found = [line.split("python run.py ")[1] for line in lines if line.strip().startswith("python run.py ")]
    return [line for line in found if "<" not in line and "--" not in line]


@pytest.mark.parametrize("command", commands())
def test_every_documented_command_composes(command: str) -> None:
    words = shlex.split(command, comments=True)
    sweep = "-m" in words
    chosen = [word for word in words if word != "-m"]
    cfg = composed([first_of(word) if sweep else word for word in chosen])
    OmegaConf.to_container(cfg, resolve=True)


def first_of(word: str) -> str:
    """The override with the first value of those that it sweeps over."""
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    values = override.sweep_string_iterator() if override.is_discrete_sweep() else iter([override.value().start])
    return f"{override.get_key_element()}={next(values)}"
