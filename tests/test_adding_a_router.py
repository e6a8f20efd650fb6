"""The diff in docs/routing.md, applied to a copy: the toy router then passes everything that is asked of a router."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_toy_router_of_the_docs_is_a_router(tmp_path):
    for name in ("upcycle", "evals", "launch", "conf", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "routing.md").read_text(), re.S)
    environment = {key: value for key, value in os.environ.items() if key != "UPCYCLE_NO_SKIP"}

    def run(*command: str, **options) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("git", "apply", "-", input=diff)
    tests = ["tests/test_routers.py", "-k", "squared or among", "-m", "not slow", "-p", "no:cacheprovider", "-n", "0"]
    ran = run(sys.executable, "-m", "pytest", "-q", *tests)
    assert re.search(r"^16 passed", ran, re.M), (
        ran
    )  # seven claims on each side, one resumed run, and that none is left out
    made = "from upcycle import preset; print(preset('btx_soft', router={'kind': 'squared'}).router.form)"
    assert run(sys.executable, "-c", made) == "squared\n"
