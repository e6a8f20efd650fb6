"""Sweeps: a failing point leaves the others be, in this process and in others; means and intervals over replicates."""

from __future__ import annotations

import csv
import json
import math

import pytest
from scipy.stats import t

from evals.sweeps import format_sweep, render_sweep, rows, summarise, table
from launch.sweep import note_point, read_points
from tests.test_launch import TINY, upcycle

SMALL = [
    *TINY, "~mixtures.btx", "~mixtures.btx_top1", "~mixtures.btx_random", "~mixtures.bam_shared_kv", "dense=null", "soup=false",
    "track.progress=false",
]  # fmt: skip


def report(nats, **more):
    average = {"trained": {"nats_per_token": nats, "perplexity": math.exp(nats)}}
    model = {"kind": "btx", "average": average, "perplexity": {"code": math.exp(nats)}, "parameters": 10} | more
    return {"models": {"btx": model}, "domain_groups": {"trained": ["code"]}}


def point(number, settings, nats=None, error=None):
    state = "failed" if error else "done"
    return {
        "point": str(number), "settings": settings, "state": state, "error": error, "report": None if nats is None else report(nats),
    }  # fmt: skip


POINTS = [
    point(0, {"mix.lr": "0.1", "rng_seed": "1"}, 3.0),
    point(1, {"mix.lr": "0.1", "rng_seed": "2"}, 3.2),
    point(2, {"mix.lr": "0.2", "rng_seed": "1"}, 2.5),
    point(3, {"mix.lr": "0.2", "rng_seed": "2"}, error="it broke"),
]


def test_points_that_differ_in_rng_seed_are_replicates():
    found = summarise(POINTS)
    assert [group["settings"] for group in found["groups"]] == [{"mix.lr": "0.1"}, {"mix.lr": "0.2"}]
    first, second = (group["models"]["btx"] for group in found["groups"])
    half = t.ppf(0.975, 1) * 0.1  # the standard error of 3.0 and 3.2
    assert first["mean"] == pytest.approx(3.1) and first["interval"] == pytest.approx([3.1 - half, 3.1 + half])
    assert second == {"mean": 2.5, "interval": None, "points": 1}
    assert table(found)[0] == ["mix.lr", "points", "btx"]
    assert table(found)[1][1] == "2" and table(found)[2] == ["0.2", "1 of 2", "12.18"]
    text = format_sweep(found)
    assert "point 3 (mix.lr=0.2 rng_seed=2) failed: it broke" in text and "22.20 [6.230, 79.09]" in text
    assert "it broke" in render_sweep("rates", found)


def test_a_row_is_a_model_of_a_point_and_a_failed_point_has_one_too():
    found = rows(POINTS)
    assert [(one["point"], one.get("model"), one["state"]) for one in found] == [
        ("0", "btx", "done"), ("1", "btx", "done"), ("2", "btx", "done"), ("3", None, "failed"),
    ]  # fmt: skip
    assert found[0]["perplexity code"] == found[0]["trained perplexity"] == pytest.approx(math.exp(3.0))
    assert found[0]["parameters"] == 10 and found[3]["error"] == "it broke"


def test_points_are_read_by_number_with_the_settings_that_differ(tmp_path):
    with pytest.raises(ValueError, match="no point of a sweep is there"):
        read_points(tmp_path)
    for number in (10, 2):
        note_point(tmp_path / str(number), ["a=1", f"b={number}", "~c"], None, ended=number == 2)
    found = read_points(tmp_path)
    assert [one["point"] for one in found] == ["2", "10"]
    assert [one["settings"] for one in found] == [{"b": "2"}, {"b": "10"}]
    assert [one["state"] for one in found] == ["done", "ended without a word"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "processes"])
def test_a_point_that_fails_leaves_the_others_be(launcher, tmp_path):
    words = ["-m", *SMALL, f"hydra/launcher={launcher}", "mix.lr=1e-3,1e30,2e-3"]
    done = upcycle(*words, cwd=tmp_path, check=False, timeout=900)  # all three points in one call
    assert done.returncode == 2, done.stdout + done.stderr
    root = tmp_path / "runs" / "tiny"
    with (root / "sweep.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert {(line["point"], line["state"]) for line in lines} == {("0", "done"), ("1", "failed"), ("2", "done")}
    (failed,) = [line for line in lines if line["state"] == "failed"]
    assert "gradient norm nan" in failed["error"] and failed["mix.lr"] == "1e+30"
    branches = [json.loads((root / point / "manifest.json").read_text())["branch/code"] for point in "012"]
    assert len(set(branches)) == 1
    assert "point 1 (mix.lr=1e+30) failed" in done.stdout
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "artifacts").glob("mix-*/stage.json")}
    assert len(before) == 2
    again = upcycle(*words, cwd=tmp_path, check=False)
    assert again.returncode == 2 and before == {path: path.stat().st_mtime_ns for path in before}
    shown = upcycle("sweep", "tiny", cwd=tmp_path, check=False)
    assert shown.returncode == 2 and "point 1 (mix.lr=1e+30) failed" in shown.stdout
    (root / "1" / "point.json").unlink()
    assert upcycle("sweep", "tiny", cwd=tmp_path).returncode == 0
