"""The product's command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.configuration import ROOT

# Imports once, which takes seconds, and runs each line in a child that finds everything as a fresh process would.
IN_TURN = """
import json, os, sys
from run import main
for number, line in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        file = os.open(f"{number}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = ["run.py", *line]
        main()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


class Done(NamedTuple):
    """How a command ended, and what it wrote."""

    returncode: int
    text: str


def environment() -> dict[str, str]:
    return os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "COLUMNS": "160", "PYTHONPATH": str(ROOT)}


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python run.py <arguments>` in `folder`."""
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


def calls(folder: Path, lines: Sequence[Sequence[str]]) -> list[Done]:
    """The same for several lines of arguments, one after the other."""
    command = [sys.executable, "-c", IN_TURN, json.dumps([list(line) for line in lines])]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    codes = [int(code) for code in done.stdout.split()]
    return [Done(code, (folder / f"{number}.txt").read_text()) for number, code in enumerate(codes)]
