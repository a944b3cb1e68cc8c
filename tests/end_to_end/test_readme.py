"""The README's tables are those of the results files."""

from __future__ import annotations

import subprocess
import sys

from tests.configuration import ROOT


def test_tables_are_what_the_files_say() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), "--check"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).returncode == 0
