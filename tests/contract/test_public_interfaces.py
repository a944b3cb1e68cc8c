"""Only what torch, torchvision and Lightning document: private names change from one release to the next."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.configuration import ROOT

ROOMS = sorted(path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
FILES = [ROOT / "run.py", *(path for room in ROOMS for path in sorted(room.glob("*.py")))]
PRIVATE_MODULE = re.compile(r"(?:torch|torchvision|pytorch_lightning)(?:\.\w+)*\.(?:_[a-z]\w*|experimental)\b")
PRIVATE_IMPORT = re.compile(r"from (?:torch|torchvision|pytorch_lightning)[\w.]* import (?:\w+, )*_")
PRIVATE_NAME = re.compile(
    r"\.(?:_BatchNorm|_ConvNd|_NormBase|_metadata|_parameters|_buffers|_modules|_(?:forward|backward)(?:_pre)?_hooks)\b"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_is_used(path: Path) -> None:
    text = path.read_text()
    found = [match[0] for kind in (PRIVATE_MODULE, PRIVATE_IMPORT, PRIVATE_NAME) for match in kind.finditer(text)]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "from torch.fx.experimental.optimization import fuse",
        "isinstance(module, nn.modules.batchnorm._BatchNorm)",
        "versioned._metadata = own._metadata",
        "from torch.fx.node import Node, _side_effectful_functions",
        "torch._dynamo.reset()",
    ],
)
def test_private_names_would_be_found(line: str) -> None:
    assert any(kind.search(line) for kind in (PRIVATE_MODULE, PRIVATE_IMPORT, PRIVATE_NAME))
