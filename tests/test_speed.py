"""The benchmark table: its arithmetic, its JSON, what becomes of a peer that fails; and cheap benchmarks in tiny sizes."""

import itertools
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import evals.speed
import upcycle.losses
from evals.benchmarks import assembly, checks, decoding, limits, memory, scaling, shapes, training
from evals.benchmarks.rows import AT_MOST, TARGETS, Row, compared, lines, unscored
from evals.benchmarks.sides import Bench, Side, SideFailed, alternate, environment
from upcycle.cost import Shape

# The ratios to reach, as the project promises them; memory_logits is to be at most that.
PROMISED = {
    "train_btx_default": 2.7, "train_btx_tuned": 1.4, "train_btx_dense": 0.90, "train_btx_compiled": 0.90,
    "train_btx_compile_gain": 1.15, "train_bam_dense": 0.95, "train_dense_peak": 0.5, "memory_logits": 0.6,
    "decode_bam_shared_kv": 0.8, "assembly_mergekit": 2.5, "ties_mergekit": 3, "assembly_cp": 0.5, "ties_cp": 0.25,
    "tokenize": 0.8, "ranks_ddp": 1.7, "ranks_zero2": 1.7, "start_plan": 1,
}  # fmt: skip
FIELDS = {"name", "ours", "peer", "unit", "ratio", "target", "met", "spread", "rounds", "checked"}


# The arithmetic ------------------------------------------------------------------------------------------------------


def test_rates_are_ours_over_the_peers():
    row = compared("train_btx_tuned", "", [140.0, 150.0, 100.0], [100.0, 100.0, 100.0], "tokens/s")
    assert (row.ours, row.peer, row.ratio, row.spread) == (140.0, 100.0, 1.4, (1.0, 1.5))
    assert row.target == 1.4 and row.met is True
    assert compared("train_btx_tuned", "", [139.0], [100.0], "tokens/s").met is False


def test_seconds_are_the_peers_over_ours():
    row = compared("assembly_mergekit", "", [2.0, 4.0, 5.0], [12.0, 10.0, 8.0], "s", less_is_better=True)
    assert (row.ours, row.peer, row.ratio, row.met) == (4.0, 10.0, 2.5, True)
    assert row.spread == (1.6, 6.0) and row.rounds == 3


def test_memory_of_logits_is_ours_over_the_peers_and_is_to_be_small():
    assert {"memory_logits", "memory_logits_checkpointed"} == AT_MOST
    row = compared("memory_logits", "", [6.0], [10.0], "bytes", less_is_better=True)
    assert (row.ratio, row.met) == (0.6, True)
    assert compared("memory_logits", "", [6.1], [10.0], "bytes", less_is_better=True).met is False
    assert compared("memory_logits_checkpointed", "", [6.0], [10.0], "bytes", less_is_better=True).ratio == 0.6


def test_a_name_without_a_target_is_reported():
    row = compared("train_bam_parallel", "", [3.0], [2.0], "tokens/s")
    assert (row.ratio, row.target, row.met) == (1.5, None, None)
    assert "report" in list(lines([row]))[1]


def test_an_unpaired_round_is_no_row():
    with pytest.raises(AssertionError, match="2 rounds of ours, 1 of the peer"):
        compared("tokenize", "", [1.0, 2.0], [1.0], "s")


def test_what_was_not_compared_is_neither_met_nor_missed():
    row = unscored("ties_mergekit", "tiny", "s", "mergekit-yaml ended with exit status 1")
    assert (row.ratio, row.met, row.target) == (None, None, 3.0)
    cells = list(lines([row]))[1]
    assert cells[5] == "–" and cells[8] == "–" and "NOT COMPARED: mergekit-yaml ended" in cells[-1]


def test_every_promised_ratio_has_its_target():
    assert TARGETS == PROMISED
    ours = set(Row(name="", case="", unit="").to_dict())
    assert ours >= FIELDS


def test_a_limit_binds_only_where_it_is_near():
    assert limits.nearest(0.45, 0.3) == "neither of compute (45%) and memory (30%) binds"
    assert limits.nearest(0.75, 0.3) == "nearest: compute, 75% of the matmul peak"
    assert limits.nearest(0.4, 0.8).startswith("nearest: memory, ") and "80%" in limits.nearest(0.4, 0.8)


def test_limits_are_of_the_median_round(tmp_path):
    bench = Bench(tmp_path, known={"limits": {"matmul": 1e9, "memory": 1e9}})
    rounds = [{"tokens_per_second": rate, "peak": 1e9, "seconds": 1.0} for rate in (100, 800, 900)]
    said = limits.of_training(bench, {"flops_per_token": 1e6, "parameters": 10}, *rounds)
    assert said == "nearest: compute, 80% of the matmul peak; the matmul peak is 1 GFLOP/s"


def test_exponents_are_slopes_of_logarithms():
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    curve = scaling.Curve("scaling_step", "layers", "s", (1.0, 2.0), (1.0, 4.0), (5.0, 10.0))
    row = curve.row()
    assert (row.ours, row.peer) == (pytest.approx(2), pytest.approx(1)) and "+1.00 from cost.py" in row.note
    moved = scaling.Curve("scaling_assembly", "bytes", "s", (1.0, 2.0), (1.0, 2.0), (5.0, 10.0), "bytes moved", 3).row()
    assert "+0.00 from bytes moved" in moved.note and moved.rounds == 3


def test_curves_are_drawn(tmp_path):
    curve = scaling.Curve("scaling_step", "layers", "s", (1.0, 2.0), (1.0, 4.0), (5.0, 10.0))
    (path,) = scaling.draw([curve], tmp_path / "new")
    assert "exponent 2.00" in path.read_text() or path.stat().st_size > 5000


# Sides and checks ----------------------------------------------------------------------------------------------------


class Counting(Side):
    """A side without a process."""

    order: list = []

    def __init__(self, name, fails_at=None):
        self.name, self.asked, self.fails_at = name, 0, fails_at

    def ready(self):
        return {"name": self.name}

    def ask(self, what):
        self.asked += 1
        self.order.append(self.name)
        if self.asked == self.fails_at:
            raise SideFailed(f"{self.name} ended with exit status 3: out of memory")
        return {"figure": self.asked}

    def close(self):
        self.order.append(f"{self.name} closed")


def test_sides_measure_in_turn_and_one_that_fails_stays_out(monkeypatch):
    monkeypatch.setattr(Counting, "order", [])
    found = alternate({"ours": Counting("ours"), "peer": Counting("peer", fails_at=2)}, rounds=3)
    assert Counting.order[:5] == ["ours", "peer", "peer", "ours", "ours"]  # every other time backwards
    assert Counting.order[5:] == ["ours closed", "peer closed"]
    assert found.of("ours", "figure") == [1, 2, 3]
    with pytest.raises(SideFailed, match="exit status 3: out of memory"):
        found.pair("ours", "peer", "figure")


def test_a_side_that_is_not_held_is_a_fresh_process_every_round(monkeypatch):
    monkeypatch.setattr(Counting, "order", [])
    alternate({"ours": Counting("ours")}, rounds=2, held=False)
    assert Counting.order[:4] == ["ours", "ours closed", "ours", "ours closed"]


def test_a_process_that_fails_says_why(tmp_path):
    with (
        Bench(tmp_path).side("data:PeerSide", {"folder": str(tmp_path)}) as side,
        pytest.raises(SideFailed, match=r"data:PeerSide ended with exit status 1: (.|\n)*train\.parquet"),
    ):
        side.ready()


def test_what_is_measured_has_no_allocator_or_threads_of_this_process(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plain = environment(None)
    assert not [name for name in plain if name.startswith(("MALLOC_", "OMP_"))]
    assert environment(2)["OMP_NUM_THREADS"] == "2"


def test_a_peer_that_computes_something_else_is_found():
    ours = {"probe": [1.0, -2.0], "active_parameters": 12, "routers": 2, "parameters": 20, "planned_parameters": 20}
    checks.same_logits(ours, {"probe": [1.0001, -2.0]}, "peer")
    with pytest.raises(SideFailed, match="peer: its logits differ from ours by 5.0e-02 of the largest"):
        checks.same_logits(ours, {"probe": [1.1, -2.0]}, "peer")
    with pytest.raises(SideFailed, match="gives 1 logits where ours gives 2"):
        checks.same_logits(ours, {"probe": [1.0]}, "peer")
    with pytest.raises(SideFailed, match="logits differ"):
        checks.same_logits(ours, {"probe": [float("nan"), -2.0]}, "peer")
    checks.same_size(ours, {"parameters": 10})
    with pytest.raises(SideFailed, match="the dense model has 11 parameters, the mixture 10 active ones"):
        checks.same_size(ours, {"parameters": 11})
    checks.as_planned(ours)
    with pytest.raises(SideFailed, match="plans 19 parameters, the model has 20"):
        checks.as_planned(ours | {"planned_parameters": 19})
    first = [{"first_loss": [6.0], "rows": [1.0, 2.0]}, {"first_loss": [], "rows": []}]
    checks.same_first_step(first, [{"first_loss": [6.001], "rows": [1.01, 2.0]}], "peer")
    with pytest.raises(SideFailed, match="first step has 6.0100 nats a token, ours 6.0000"):
        checks.same_first_step(first, [{"first_loss": [6.01], "rows": [1.0, 2.0]}], "peer")
    with pytest.raises(SideFailed, match="gradients of its first step are off by 44.7% of ours"):
        checks.same_first_step(first, [{"first_loss": [6.0], "rows": [2.0, 2.0]}], "peer")


def test_a_first_step_on_another_batch_is_seen(tmp_path):
    """What is timed says so itself: the loss of fresh models hardly depends on the tokens, gradients of the embedding do."""
    from evals.benchmarks.training_sides import LoopSide

    bench = Bench(tmp_path, quick=True)
    config = training.config_of(bench, shapes.QUICK)
    tokens = Path(config["data"]) / "train.tokens.npy"
    one = LoopSide(config).measure()
    same = LoopSide(config).measure()
    np.save(tokens, np.roll(np.load(tokens), 7))
    other = LoopSide(config).measure()
    checks.same_first_step([one], [same], "the same")
    with pytest.raises(SideFailed, match="gradients of its first step are off"):
        checks.same_first_step([one], [other | {"first_loss": one["first_loss"]}], "another")


def test_dense_twins_have_the_active_parameters_of_their_mixtures():
    from upcycle.api import preset

    for size in (shapes.QUICK, shapes.SMALL, shapes.SMOLLM2):
        seed = Shape.of_config(size.seed)
        for method, twin in (("btx", size.wider(feed_forward=2)), ("bam", size.wider(heads=4))):
            mixture = seed.assembled(preset(method), ["code", "law", "math"])
            dense = Shape.of_config(twin)
            assert dense.parameters == mixture.active_parameters - mixture.router_rows * mixture.hidden
    assert Shape.of_config(shapes.SMOLLM2.seed).parameters == 134_515_008  # SmolLM2-135M's


def test_a_peer_that_is_not_there_or_fails_is_reported(tmp_path):
    bench = Bench(tmp_path, quick=True, rounds=1)
    with pytest.raises(SideFailed, match=r"no_such_program did not start \(No such file or directory\)"):
        assembly.whole_process([str(tmp_path / "no_such_program")], bench)
    with pytest.raises(SideFailed, match=r"ended with exit status 7: bad plan"):
        assembly.whole_process([sys.executable, "-c", "import sys; print('bad plan'); sys.exit(7)"], bench)

    def ours(out):
        return [sys.executable, "-c", "pass"]

    def peer(out):
        return [sys.executable, "-c", "import sys; sys.exit('no such base model')"]

    row = assembly.duel(bench, "ties_mergekit", {"ours": ours, "peer": peer}, "same_model", "")
    assert row.met is None and row.ratio is None and "exit status 1: no such base model" in row.problem


# The command ---------------------------------------------------------------------------------------------------------


def test_groups_and_benchmarks_are_chosen_by_name():
    assert list(evals.speed.chosen(["data"])) == ["tokenize"]
    assert list(evals.speed.chosen(["against_cp", "start"])) == ["against_cp", "plan"]
    everything = evals.speed.chosen([])
    assert "btx" in everything and not [name for name in everything if name.startswith("scaling")]
    assert set(evals.speed.chosen(["scaling"])) == {"scaling_training", "scaling_ranks", "scaling_assembly"}
    with pytest.raises(ValueError, match="asembly is no group and no benchmark; .* did you mean assembly"):
        evals.speed.chosen(["asembly"])


def test_names_of_groups_and_benchmarks_are_told_apart():
    names = [name for group in evals.speed.GROUPS.values() for name in group]
    assert len(names) == len(set(names)) and not set(names) & set(evals.speed.GROUPS)


def test_an_unknown_name_ends_with_status_2(capsys):
    assert evals.speed.main(["trainin"]) == 2
    assert "did you mean training" in capsys.readouterr().err


def test_a_page_of_part_of_a_run_is_refused(capsys):
    for given in (["--page", "--quick"], ["--page", "data"]):
        with pytest.raises(SystemExit):
            evals.speed.main(given)
        assert "--page is of one whole run" in capsys.readouterr().err


def fake(monkeypatch, *rows):
    monkeypatch.setattr(evals.speed, "GROUPS", {"data": {"tokenize": lambda bench: iter(rows)}})


def test_json_holds_every_row(monkeypatch, tmp_path, capsys):
    good = compared("tokenize", "text", [9.0, 8.0], [10.0, 10.0], "bytes/s")
    fake(monkeypatch, good)
    assert evals.speed.main(["data", "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row.keys() >= FIELDS and row["ratio"] == 0.85 and row["met"] is True and row["spread"] == [0.8, 0.9]
    assert row["quick"] is False
    assert "0.85" in capsys.readouterr().out


def test_what_could_not_be_compared_ends_with_status_1(monkeypatch, tmp_path, capsys):
    fake(monkeypatch, unscored("tokenize", "text", "bytes/s", "they differ"))
    assert evals.speed.main(["data", "--quick", "--json", str(tmp_path / "rows.json")]) == 1
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["met"] is None and row["problem"] == "they differ" and row["quick"] is True
    assert "are not to be published" in capsys.readouterr().out


# Tiny sizes ----------------------------------------------------------------------------------------------------------


def test_tokenizing_is_compared_with_the_tokenizer(tmp_path):
    (row,) = evals.speed.chosen(["tokenize"])["tokenize"](Bench(tmp_path, quick=True, rounds=1, threads=1))
    assert row.problem == "" and row.ratio > 0 and row.unit == "bytes/s"


class Here(Side):
    """A side in this process: what it measures says nothing, but that it measures."""

    def __init__(self, function, config):
        self.function, self.config, self.made = function, json.loads(json.dumps(config)), None

    def ready(self):
        if self.made is None:
            module, name = self.function.split(":")
            self.made = getattr(import_module(f"evals.benchmarks.{module}"), name)(self.config)
        return json.loads(json.dumps(getattr(self.made, "about", self.made)))

    def ask(self, what):
        self.ready()
        return json.loads(json.dumps(getattr(self.made, what)()))

    def close(self):
        self.made = None


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "side", lambda self, function, config, keeps_freed_memory=False: Here(function, config))
    monkeypatch.setattr(upcycle.losses, "FULL_LOGITS_BYTES", upcycle.losses.FULL_LOGITS_BYTES)  # a side changes it
    return Bench(tmp_path, quick=True, rounds=2, known={"limits": {"matmul": 1e11, "memory": 1e10}})


ROWS = {
    "btx": ["train_btx_default", "train_btx_tuned", "train_btx_dense"],
    "bam": ["train_bam_dense"],
    "bam_parallel": ["train_bam_parallel"],
    "attention_forms": [f"bam_attention_{form}" for form in ("matmul", "blocks", "causal_blocks")],
    "dense_peak": ["train_dense_peak"],
    "logits": ["memory_logits", "memory_logits_checkpointed"],
    "shared_kv": ["decode_bam_shared_kv"] * 2,
    "against_cp": ["assembly_cp", "ties_cp"],
    "scaling_training": ["scaling_step", "scaling_memory"] * 4,
    "scaling_assembly": ["scaling_assembly"] * 2,
}


@pytest.mark.parametrize("name", ROWS)
def test_a_benchmark_runs_and_its_checks_hold(bench, name, monkeypatch):
    monkeypatch.setattr(memory, "_status", lambda field: next(growing))  # of one process after the other
    growing = itertools.count(2**20, 2**20)
    rows = list(evals.speed.chosen([name])[name](bench))
    assert [row.name for row in rows] == ROWS[name]
    for row in rows:
        assert not row.problem and (row.ratio > 0 if row.unit != "exponent" else row.peer is not None), row


def test_a_mixture_that_is_not_the_peers_is_not_scored(bench, monkeypatch):
    """The peer's weights are changed after the export."""
    from evals.benchmarks import models
    from upcycle.checkpoint import overwrite_tensors

    write = models.write_btx

    def write_another(config):
        made = write(config)
        name = "model.layers.0.input_layernorm.weight"
        overwrite_tensors(Path(config["folder"]) / "native", {name: torch.full((32,), 2.0)})
        return made

    monkeypatch.setattr(models, "write_btx", write_another)
    default, tuned, dense = evals.speed.chosen(["btx"])["btx"](bench)
    assert "its logits differ from ours" in default.problem and "its logits differ from ours" in tuned.problem
    assert default.met is tuned.met is None and dense.ratio > 0


def test_a_cache_that_is_not_the_seeds_is_not_scored(bench, monkeypatch):
    monkeypatch.setattr(decoding, "METHOD", "bam")
    for row in evals.speed.chosen(["shared_kv"])["shared_kv"](bench):
        assert row.met is None and "the mixture's cache has" in row.problem


def test_a_form_that_is_not_attention_is_not_scored(bench, monkeypatch):
    from evals.benchmarks import attention_forms

    def uncausal(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    monkeypatch.setitem(attention_forms.FORMS, "blocks", uncausal)
    with pytest.raises(ValueError, match="blocks is not exact attention"):
        list(evals.speed.chosen(["attention_forms"])["attention_forms"](bench))


def test_a_profile_names_operators(bench):
    found = training.profiles(bench)
    assert len(found) == 4 and all(one["operators"][0][1] > 0.01 for one in found.values())
    assert any(name.startswith("BTX") for name in found)


@pytest.mark.slow
def test_the_command_holds_a_merge_against_mergekits(tmp_path):
    command = [sys.executable, "-m", "evals.speed", "ties_mergekit", "--quick", "--threads", "1"]
    done = subprocess.run([*command, "--json", str(tmp_path / "rows.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["name"] == "ties_mergekit" and row["ratio"] > 0 and row["quick"]
    assert "mean nothing" in done.stdout


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains(tmp_path):
    (row,) = evals.speed.chosen(["ddp"])["ddp"](Bench(tmp_path, quick=True, rounds=1))
    assert not row.problem and row.ratio > 0
