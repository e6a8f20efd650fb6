"""Fifteen random kills and damaged checkpoints, at moments drawn with one rng_seed; `python -m tests.faults --kills 100` is the longer form."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults import SETTINGS, damage, differences, left_running, members, run, strike, undisturbed
from tests.test_kills import contents, served
from tests.test_launch import ROOT


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes():
    found = run(15, random.Random(1))
    assert found["differences"] == []
    assert found["kills"] == found["SIGKILL"] + found["SIGTERM"] >= 15 and len(found["in stages"]) > 3
    assert found["damaged checkpoints noticed"] == found["damaged checkpoints"]


@pytest.mark.slow
def test_killed_runs_of_two_processes_end_with_the_same_bytes_and_leave_nothing_running():
    found = run(5, random.Random(1), processes=2)
    assert found["differences"] == []
    assert found["kills"] == found["driver"] + found["rank"] + found["all"] >= 5
    assert found["damaged checkpoints noticed"] == found["damaged checkpoints"]


TREE = """
import os, subprocess, sys, time
for rank in "01":
    words = [sys.executable, "-c", "import time; open('rank' + %r, 'w'); time.sleep(60)" % rank, "launch.pipeline"]
    subprocess.Popen(words, env=os.environ | {"RANK": rank}, start_new_session=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("victim", "left"), [("driver", 2), ("rank", 2), ("all", 0)])
def test_a_kill_hits_whom_it_is_meant_for_and_what_it_leaves_is_seen(tmp_path, monkeypatch, victim, left):
    monkeypatch.setattr("tests.faults.PATIENCE", 1.0)
    driver = subprocess.Popen([sys.executable, "-c", TREE], cwd=tmp_path)
    limit = time.monotonic() + 60
    while not all((tmp_path / f"rank{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert strike(members(tmp_path), victim, 1, signal.SIGKILL, random.Random(0)) == victim
    found = left_running(tmp_path)
    assert len(found) == left and (victim == "rank") == any(line.startswith(f"{driver.pid} ") for line in found)
    for process in members(tmp_path):
        process.kill()
    driver.wait()


def test_where_no_group_is_at_work_the_driver_is_hit(tmp_path):
    driver = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=tmp_path)
    assert strike(members(tmp_path), "rank", 0, signal.SIGTERM, random.Random(0)) == "driver"
    assert driver.wait() == -signal.SIGTERM


def test_a_byte_and_a_missing_file_are_differences(tmp_path):
    for place, byte in (("a", b"x"), ("b", b"y")):
        for name in ("seed-00000000", f"mix-{place}"):
            (tmp_path / place / "artifacts" / name).mkdir(parents=True)
            (tmp_path / place / "artifacts" / name / "weights").write_bytes(byte)
            (tmp_path / place / "artifacts" / name / "timing.json").write_bytes(byte)
    first, second = undisturbed(tmp_path / "a"), undisturbed(tmp_path / "b")
    assert differences(first, first) == []
    assert differences(first, second) == [
        "mix-a is on one side only", "mix-b is on one side only", "seed-00000000/weights",
    ]  # fmt: skip


def test_times_in_reports_are_no_differences(tmp_path):
    for place, seconds in (("a", 1), ("b", 2)):
        where = tmp_path / place / "artifacts" / "report-00000000"
        where.mkdir(parents=True)
        (where / "report.json").write_text(f'{{"models": {{"btx": {{"seconds": {seconds}, "perplexity": 3}}}}}}')
        (where / "report.html").write_text(str(seconds))
    assert differences(undisturbed(tmp_path / "a"), undisturbed(tmp_path / "b")) == []


def test_damage_hits_the_newest_checkpoint_of_a_training(tmp_path):
    draw = random.Random(0)
    assert damage(tmp_path, draw) is None
    for step in (1, 2):
        where = tmp_path / "artifacts" / "mix-0.partial" / "checkpoints" / f"step-{step:08d}"
        where.mkdir(parents=True)
        (where / "model.safetensors").write_bytes(b"0123456789")
    assert damage(tmp_path, draw) == "mix-0.partial/step-00000002/model.safetensors"
    assert (where / "model.safetensors").read_bytes() != b"0123456789"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """(directory, what it holds) of a run that nothing disturbed."""
    where = tmp_path_factory.mktemp("undisturbed")
    with served() as upcycle:
        assert upcycle(*SETTINGS, cwd=where) == 0, (where / "log").read_text()
    return where, undisturbed(where)


@pytest.mark.slow
def test_two_drivers_on_one_run_make_it_once(expected, tmp_path):
    with served() as first, served() as second, ThreadPoolExecutor(2) as pool:
        ended = [pool.submit(one, *SETTINGS, cwd=tmp_path) for one in (first, second)]
        assert [one.result() for one in ended] == [0, 0], (tmp_path / "log").read_text()
    assert differences(undisturbed(tmp_path), expected[1]) == []


@pytest.mark.slow
def test_a_disk_that_fills_in_training_costs_no_result(expected, tmp_path):
    """Files above 400 kB fail, as on a full disk: a checkpoint's moments do, its weights do not."""
    whole, _ = expected
    shutil.copytree(whole / "artifacts", tmp_path / "artifacts")
    (seed,) = (tmp_path / "artifacts").glob("seed-*")
    shutil.rmtree(seed)
    words = shlex.join([sys.executable, "-m", "launch.cli", *SETTINGS, "stage=seed"])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run_it(limit):
        return subprocess.run(
            ["bash", "-c", f"{limit}exec {words}"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    full = run_it("ulimit -f 400; ")
    assert (
        full.returncode == 2 and "could not write" in full.stderr + full.stdout
    ) or "File too large" in full.stderr, full
    partial = seed.with_name(f"{seed.name}.partial")
    assert not seed.exists() and not list(partial.glob("checkpoints/step-*[0-9]"))
    assert run_it("").returncode == 0
    assert contents(seed) == contents(whole / "artifacts" / seed.name)


def test_no_result_depends_on_the_clock_of_the_day():
    """Clocks jump; what is measured and waited for goes by the monotonic one. Names of copies and folders may show the time."""
    for path in [*(ROOT / "upcycle").glob("*.py"), *(ROOT / "launch").glob("*.py")]:
        assert not re.search(r"\btime\.time\(|datetime\.(now|utcnow)\(", path.read_text()), path
