"""Fifteen random kills and damaged checkpoints, the same ones every time; `python -m tests.faults --kills 100` is the longer form."""

from __future__ import annotations

import random

import pytest

from tests.faults import MEAN_SECONDS, SETTINGS, damage, differences, run, undisturbed


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes():
    found = run(15, random.Random(1), SETTINGS, MEAN_SECONDS)
    assert found["differences"] == []
    assert found["kills"] == found["SIGKILL"] + found["SIGTERM"] >= 15 and len(found["in stages"]) > 3
    assert found["damaged checkpoints noticed"] == found["damaged checkpoints"]


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
