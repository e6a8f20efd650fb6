"""Asked to stop, training writes a checkpoint and ends with its own status; what has no checkpoints ends at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from tests.test_launch import ROOT, TINY
from upcycle import stopping

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


def start(where, **more):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    words = [sys.executable, "-m", "launch.cli", *SEED, "stage=seed", "track.progress=true"]
    return subprocess.Popen(
        words, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_rows(where, count, process):
    """Until training has written so many rows of metrics."""
    limit = time.monotonic() + 120
    while sum(path.read_text().count("\n") for path in where.glob("artifacts/seed-*.partial/metrics.jsonl")) < count:
        assert time.monotonic() < limit and process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def weights(where):
    manifest = json.loads((where / "runs" / "tiny" / "manifest.json").read_text())
    return load_file(where / "artifacts" / manifest["seed"] / "model.safetensors")


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
