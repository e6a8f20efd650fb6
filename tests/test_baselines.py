"""Baselines as a user runs them: made, measured, labelled, and gone on with."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests.test_launch import TINY, upcycle

FEW = [
    *TINY, "~mixtures.btx_top1", "~mixtures.btx_random", "~mixtures.bam", "~mixtures.bam_shared_kv",
    "+assemble@mixtures.copies.assemble=sparse_upcycling", "+mixtures.copies.match=data",
    "+assemble@mixtures.fresh.assemble=btx", "+mixtures.fresh={scratch: true, match: data}",
    "+assemble@mixtures.frozen.assemble=btx", "+mixtures.frozen.train={phases: [{frozen: [experts]}]}",
    "dense_compute={lr: 4e-3}", "btm={}", "greedy_soup=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    where = tmp_path_factory.mktemp("baselines")
    return where, upcycle(*FEW, cwd=where).stdout


def artifact(where, stage):
    manifest = json.loads((where / "runs" / "tiny" / "manifest.json").read_text())
    return where / "artifacts" / manifest[stage]


@pytest.mark.slow
def test_every_row_is_labelled_by_what_it_took(finished):
    where, printed = finished
    report = json.loads((where / "runs" / "tiny" / "report.json").read_text())
    relative = {name: model["relative"] for name, model in report["models"].items()}
    assert relative["btx"] == {"tokens": 1.0, "flops": 1.0, "label": "data- and compute-matched"}
    assert relative["frozen"] == relative["btx"]
    assert relative["seed"]["tokens"] == 0 and relative["code"]["label"] == ""
    for name in ("copies", "dense", "fresh"):  # a batch is 6 % of so short a run
        assert relative[name]["tokens"] == pytest.approx(1, abs=0.07) and relative[name]["flops"] != 1
    assert relative["dense_compute"]["flops"] == pytest.approx(1, abs=0.07)
    assert relative["btm"] == relative["soup"] == relative["greedy_soup"]
    seed = report["models"]["seed"]
    assert report["models"]["btm"]["active_parameters"] == 4 * seed["parameters"]
    assert {item["against"] for item in report["comparisons"]} == {
        "dense", "dense_compute", "btx", "seed", "btm", "oracle"
    }  # fmt: skip
    assert "÷" in printed and "data- and compute-matched" in printed


@pytest.mark.slow
def test_baselines_are_what_they_are_called(finished):
    where, _ = finished
    weights = {stage: load_file(artifact(where, stage) / "model.safetensors")
               for stage in ("assemble/frozen", "mix/frozen", "assemble/fresh", "assemble/btx")}  # fmt: skip
    for name, before in weights["assemble/frozen"].items():
        after = weights["mix/frozen"][name]
        assert (before == after).all() == (".experts." in name), name
    fresh, btx = weights["assemble/fresh"], weights["assemble/btx"]
    assert fresh.keys() == btx.keys()
    matrices = [name for name in btx if btx[name].dim() > 1 and "router" not in name]
    assert matrices and all((fresh[name] != btx[name]).all() for name in matrices)
    record = json.loads((artifact(where, "greedy_soup") / "soup.json").read_text())
    assert record["split"] == "valid" and record["ingredients"][0] == min(record["alone"], key=record["alone"].get)
    assert len(record["tried"]) == 3 and record["domains"] == ["code", "law", "math", "general"]
    evaluation = json.loads((artifact(where, "eval/btm") / "evaluation.json").read_text())
    assert evaluation["models"] == ["seed", "code", "law", "math"] and evaluation["routing"] is None


@pytest.mark.slow
def test_a_budget_is_said_in_tokens_and_the_same_command_goes_on_with_them(finished, tmp_path):
    where, _ = finished
    words = [*FEW, f"artifacts={where / 'artifacts'}", "name=short", "stage=seed"]
    first, again = (upcycle(*words, "budget=2m", cwd=tmp_path).stdout for _ in range(2))
    record = json.loads((tmp_path / "runs" / "short" / "manifest.json").read_text())["budget"]
    assert f"To repeat: tokens={record['tokens']}" in first and record["budget"] == "2m"
    assert "measured now" in first and "as measured when this run began" in again
    assert 60 < record["seconds"] <= 120 and f"tokens={record['tokens']}" in again
    stages = len(json.loads((tmp_path / "runs" / "short" / "manifest.json").read_text())) - 1  # the budget is none
    assert f" of {stages} stages done" in upcycle("status", cwd=tmp_path).stdout


def test_a_budget_of_another_form_stops_at_once(tmp_path):
    done = upcycle(*TINY, "budget=2x", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.startswith(
        "upcycle: budget=2x: expected hours and minutes, such as budget=2h"
    )
    assert not (tmp_path / "artifacts").exists()
