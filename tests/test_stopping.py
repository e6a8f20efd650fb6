"""Asked to stop, training writes a checkpoint and ends with its own status; what has no checkpoints ends at once. Groups of processes too."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console
from safetensors.torch import load_file

from launch import branches, groups
from launch.config import LaunchConfig
from tests.faults import left_running, members, rank_of
from tests.test_launch import ROOT, TINY
from upcycle import stopping
from upcycle.store import Artifact

SEED = [*TINY, "seed.train.tokens=65536", "launch.checkpoint_seconds=null", "launch.threads=1"]
DATA = "stage=[documents/code,documents/law,documents/math,documents/general,tokenizer,tokens/code,tokens/law,tokens/math,tokens/general]"


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(stopping, "_state", {"looks": False, "asked": None})


def test_a_signal_is_heeded_where_somebody_looks_and_ends_the_process_elsewhere(fresh, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        stopping.on_sigterm()
    assert ended.value.code == stopping.TERMINATED and not stopping.asked()
    with stopping.looking():
        stopping.on_sigterm()
        assert stopping.asked()
        stopping.on_sigterm()  # told by another as well
        monkeypatch.setattr(stopping, "ONE_REQUEST", 0.0)
        with pytest.raises(SystemExit) as ended:  # asked again
            stopping.on_sigterm()
    assert ended.value.code == stopping.TERMINATED


def test_a_file_asks_too(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv(stopping.FILE, str(tmp_path / "stop"))
    assert not stopping.asked()
    (tmp_path / "stop").touch()
    assert stopping.asked()


def test_stopped_is_no_error():
    assert stopping.Stopped().code == stopping.AGAIN and not issubclass(stopping.Stopped, Exception)


def test_what_one_of_ours_has_started_is_asked_by_a_file_of_its_own(fresh, monkeypatch):
    with stopping.passing_on() as stop:
        environment = groups.child_environment(stop=stop)
        stopping.on_sigterm()  # is looked at here
        assert stopping.signalled() and not stop.exists()
        monkeypatch.setattr(stopping, "_state", {"looks": False, "asked": None})
        monkeypatch.setenv(stopping.PASSED_ON, environment[stopping.PASSED_ON])
        assert not stopping.asked()
        stop.touch()
        assert stopping.asked()
    assert not stop.exists()


# Small processes in place of a group ---------------------------------------------------------------------------------

BEGIN = "import os, pathlib, sys, time; from upcycle import stopping; stopping.end_with_parent(); "
SAVES = "\nwhile not stopping.asked(): time.sleep(0.01)\nsys.exit(75)"
STAYS = "\npathlib.Path('there').touch()\ntime.sleep(60)"


def python(code, *arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | more.pop("env", {}),
        **more,
    )


def wait_for(path):
    limit = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < limit, f"{path} did not come"
        time.sleep(0.01)


@pytest.mark.parametrize("by", ["one of ours", "torchrun", "nobody"])
def test_a_process_ends_with_the_one_that_started_it(tmp_path, by):
    """Though it is in a session of its own, as the ranks of torchrun are, and its parent is killed without a word."""
    own = {"one of ours": f"{stopping.PARENT}=str(os.getpid())", "torchrun": f"{stopping.ELASTIC}='1'", "nobody": ""}[
        by
    ]
    code = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', sys.argv[1]], env=os.environ | dict({own}), start_new_session=True)\n"
        "time.sleep(60)"
    )
    parent = python(code, BEGIN + STAYS, cwd=tmp_path)
    wait_for(tmp_path / "there")
    (child,) = [one for one in members(tmp_path) if one.pid != parent.pid]
    parent.kill()
    parent.wait()
    if by == "nobody":
        assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        child.kill()
    assert left_running(tmp_path) == []


def test_a_process_whose_parent_has_gone_before_does_not_begin(tmp_path):
    gone = python("", cwd=tmp_path)
    gone.wait()
    child = python(BEGIN + STAYS, cwd=tmp_path, env={stopping.PARENT: str(gone.pid)})
    assert child.wait(timeout=60) == stopping.TERMINATED and not (tmp_path / "there").exists()


def made_by(code, tmp_path, monkeypatch, saves=True):
    """`make_in_group` with that code in place of a launcher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(groups, "command", lambda *_: [sys.executable, "-c", BEGIN + code])
    stage = Artifact("mix/bam", print, None, {}, "0" * 64, tmp_path / "artifacts" / "mix-bam-0")
    groups.make_in_group(LaunchConfig(config="ddp", processes=2), [], stage, saves)


@pytest.fixture
def asked_soon(fresh, tmp_path, monkeypatch):
    """SIGTERM comes to the driver when its group is there."""
    sleeping = subprocess.Popen.wait

    def wait(process, timeout=None):
        wait_for(tmp_path / "there")
        stopping.on_sigterm()
        monkeypatch.setattr(subprocess.Popen, "wait", sleeping)
        return process.wait(timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)


def test_a_driver_that_is_asked_asks_its_group(asked_soon, tmp_path, monkeypatch):
    with pytest.raises(stopping.Stopped):
        made_by("pathlib.Path('there').touch()" + SAVES, tmp_path, monkeypatch)


def test_a_driver_that_is_asked_ends_a_group_that_has_no_checkpoints(asked_soon, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        made_by(STAYS, tmp_path, monkeypatch, saves=False)
    assert ended.value.code == stopping.TERMINATED and left_running(tmp_path) == []


def test_a_group_that_dies_of_the_same_signal_was_stopped_and_has_not_failed(asked_soon, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        made_by("pathlib.Path('there').touch(); time.sleep(0.5); os.kill(os.getpid(), 15)", tmp_path, monkeypatch)
    assert ended.value.code == stopping.TERMINATED


def test_a_group_that_ends_by_itself_names_the_stage_and_what_to_do(fresh, tmp_path, monkeypatch):
    message = r"stage mix/bam: its 2 processes ended without finishing it .*it is missing, and the same command goes on from there"
    with pytest.raises(RuntimeError, match=message):
        made_by("sys.exit(1)", tmp_path, monkeypatch)


def test_branches_side_by_side_are_asked_too(fresh, tmp_path, monkeypatch):
    """The one that trains saves, and the next is not begun."""
    one, other = (
        Artifact(f"branch/{name}", print, {}, {}, "0" * 64, tmp_path / "artifacts" / f"branch-{name}-0")
        for name in ("a", "b")
    )
    begun = []

    def start(_launch, _arguments, stage, number, _share, logs, stop):
        begun.append(stage.name)
        process = python(BEGIN + SAVES, cwd=tmp_path, env=groups.child_environment(stop=stop))
        return branches._Job(stage, process, logs / "log", number)

    monkeypatch.setattr(branches, "_start", start)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: (stopping.on_sigterm(), sleep(seconds)))
    with pytest.raises(stopping.Stopped):
        branches.make_side_by_side(LaunchConfig(), [], [one, other], tmp_path, Console())
    assert begun == ["branch/a"]


def test_a_group_is_ended_whatever_it_does_about_signals(tmp_path):
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process = python("import pathlib, time; " + code + STAYS, cwd=tmp_path)
    wait_for(tmp_path / "there")
    groups.end([process], patience=0.5)
    assert process.returncode == -signal.SIGKILL


def test_the_rank_that_ended_a_group_is_named():
    def first(*codes):
        return groups._first_failure(
            {rank: SimpleNamespace(exitcode=code, timestamp=0) for rank, code in enumerate(codes)}
        )

    assert first(2, 1) == (0, 2)
    assert first(2, -9) == (1, -9)  # and 0 lost its connection
    assert first(143, 75) == (1, 75)  # and 0 was told to end by torchrun when 1 had


# Real ones -----------------------------------------------------------------------------------------------------------


def start(where, *settings, **more):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    words = [sys.executable, "-m", "launch.cli", *SEED, "stage=seed", "track.progress=true", *settings]
    return subprocess.Popen(
        words, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_rows(where, count, process):
    """Until training has written so many rows of metrics."""
    limit = time.monotonic() + 300
    while sum(path.read_text().count("\n") for path in where.glob("artifacts/seed-*.partial/metrics.jsonl")) < count:
        assert time.monotonic() < limit and process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def weights(where):
    manifest = json.loads((where / "runs" / "tiny" / "manifest.json").read_text())
    return load_file(where / "artifacts" / manifest["seed"] / "model.safetensors")


WAITS = """
import os, sys, time
from pathlib import Path
(Path(sys.argv[1]) / os.environ.get("RANK", "0")).touch()
asked = Path(os.environ["UPCYCLE_PASSED_ON_STOP_FILE"])
until = time.monotonic() + 60
while not asked.exists() and time.monotonic() < until:
    time.sleep(0.1)
sys.exit(75 if asked.exists() else 1)
"""


@pytest.mark.parametrize("file, ranks", [("ddp", 2), ("cpu", 1)])
def test_a_launcher_that_is_signalled_asks_its_processes_and_ends_as_they_do(tmp_path, file, ranks):
    (tmp_path / "waits.py").write_text(WAITS)
    options = [
        "--config_file",
        str(groups.FILES / f"{file}.yaml"),
        "--num_processes",
        str(ranks),
        "--num_machines",
        "1",
    ]
    options += ["--machine_rank", "0", "--num_cpu_threads_per_process", "1", "-m", "waits", str(tmp_path)]
    environment = os.environ | {stopping.PASSED_ON: str(tmp_path / "stop"), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    launcher = subprocess.Popen([sys.executable, "-m", "launch.groups", *options], env=environment, cwd=tmp_path)
    until = time.monotonic() + 120
    while not all((tmp_path / str(rank)).exists() for rank in range(ranks)):
        assert launcher.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == stopping.AGAIN
    assert (tmp_path / "stop").exists()


@pytest.mark.slow
def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    """Stopped by a file before it, by one after its first steps, by a signal later, and then not."""
    words = [sys.executable, "-m", "launch.cli", *SEED, DATA]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True)
    first, second = tmp_path / "stopped", tmp_path / "undisturbed"
    for place in (first, second):
        place.mkdir()
        subprocess.run(["cp", "-r", str(tmp_path / "artifacts"), str(place / "artifacts")], check=True)
    stop = first / "stop"
    stop.touch()
    process = start(first, UPCYCLE_STOP_FILE=str(stop))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == stopping.AGAIN and "asked to stop before seed" in said, said
    stop.unlink()
    process = start(first, UPCYCLE_STOP_FILE=str(stop))
    wait_for_rows(first, 1, process)
    stop.touch()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == stopping.AGAIN and re.search(r"asked to stop: step \d+ of 64 is saved", said), said
    process = start(first)
    wait_for_rows(first, 30, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == stopping.AGAIN and "going on from step" in said and "asked to stop" in said, said
    for place in (first, second):
        process = start(place)
        assert process.wait(timeout=240) == 0, process.stdout and process.stdout.read()
    stopped, undisturbed = weights(first), weights(second)
    assert stopped.keys() == undisturbed.keys()
    assert all((stopped[name] == undisturbed[name]).all() for name in stopped)


@pytest.mark.slow
def test_a_stopped_group_goes_on_to_the_same_weights(tmp_path):
    """Stopped by a file, by SIGTERM to the driver, and to one rank; two processes save the same step, and none is left."""
    words, group = (
        [sys.executable, "-m", "launch.cli", *SEED, DATA],
        ["launch=accelerate", "launch.config=ddp", "launch.processes=2"],
    )
    subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    first, second, stop = tmp_path / "stopped", tmp_path / "undisturbed", tmp_path / "stop"
    for place in (first, second):
        shutil.copytree(tmp_path / "artifacts", place / "artifacts")

    def of_rank(number):
        return next(one for one in members(first) if rank_of(one) == number)

    ways = [lambda _: stop.touch(), lambda driver: driver.terminate(), lambda _: of_rank(1).terminate()]
    for rows, ask in zip((2, 12, 30), ways, strict=True):
        process = start(first, *group, UPCYCLE_STOP_FILE=str(stop))
        wait_for_rows(first, rows, process)
        ask(process)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == stopping.AGAIN and left_running(first) == [], said
        step = int(re.search(r"asked to stop: step (\d+) of 64 is saved", said)[1])
        (saved,) = first.glob("artifacts/seed-*.partial/checkpoints/step-*")
        assert rows <= step < 64 and saved.name == f"step-{step:08d}"
        assert json.loads((saved / "state.json").read_text())["ranks"] == 2
        stop.unlink(missing_ok=True)
    for place in (first, second):
        process = start(place, *group)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0 and ("going on from step" in said) == (place == first), said
    ours, theirs = (next(place.glob("artifacts/seed-*/model.safetensors")) for place in (first, second))
    assert ours.read_bytes() == theirs.read_bytes()
