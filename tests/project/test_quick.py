"""`make quick` has a test of every folder of both packages."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTED = {"converter": ROOT / "converter" / "convert_step35", "runtime": ROOT / "runtime" / "step35"}


@pytest.mark.slow
def test_every_folder_has_a_quick_test() -> None:
    command = [sys.executable, "-m", "pytest", "--quick", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    collected = {Path(line.partition("::")[0]).parent for line in done.stdout.splitlines() if "::" in line}
    folders = [
        Path("tests") / kind / folder.name
        for kind, package in TESTED.items()
        for folder in package.iterdir()
        if (folder / "__init__.py").exists()
    ]
    missing = [folder for folder in folders if not any(path.is_relative_to(folder) for path in collected)]
    assert missing == [], done.stderr
