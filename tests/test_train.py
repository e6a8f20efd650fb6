"""The training loop: what a step does, and that a run goes on bit for bit."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from tests import reference
from tests.domains import two_domains
from tests.tiny import dense_models, mixture_of
from upcycle.batches import Batches
from upcycle.config import OptimizerConfig, PhaseConfig, ScheduleConfig, TrainConfig
from upcycle.optim import decays, learning_rate, plan_phases
from upcycle.router import RoutingTrace
from upcycle.snapshot import snapshots
from upcycle.store import KEPT, Artifact, Run, _drop_snapshots
from upcycle.train import train

QUIET = Run(say=lambda text: None, checkpoint_seconds=None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_domains(tmp_path_factory.mktemp("domains"))


def config(**changes):
    settings = dict(
        tokens=8 * 4 * 16,
        proportions={"low": 0.5, "high": 0.5},
        sequence_length=16,
        batch_sequences=4,
        micro_batch_sequences=2,
        lr=1e-2,
        schedule=ScheduleConfig(warmup_steps=2),
        precision="fp32",
    )
    return TrainConfig(**settings | changes)


def mixture(attention="merged", **choices):
    """Routers of std 0.5, balance and z-loss on."""
    choices = dict(balance="btx", balance_coefficient=0.01, z_coefficient=0.001) | choices
    return mixture_of(dense_models("llama", 3, dtype=torch.float32), attention=attention, **choices)


def run(model, settings, data, out, stop=None, options=QUIET):
    """Train; with `stop`, be killed just after that step's row is written."""
    out.mkdir(parents=True, exist_ok=True)

    class Killed(BaseException):
        pass

    def advance(done, total, **figures):
        if done == stop:
            raise Killed

    killable = replace(options, advance=advance, checkpoint_seconds=None)
    try:
        train(model, settings, data, out, killable, train_flops_per_token=1.0)
    except Killed:
        return model
    assert stop is None
    return model


def rows(out):
    """metrics.jsonl without its timings."""
    timings = ("tokens_per_second", "peak_share")
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timings} for row in found]


def assert_bit_equal(model, other):
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


PHASES = (PhaseConfig(steps=3, trainable=("router",), lr=5e-2), PhaseConfig(frozen=(r"layers\.0\.mlp\.experts",)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stop", [2, 3, 5])  # inside the first phase, on the boundary, inside the second
def test_resume_equals_straight_run(data, tmp_path, stop, precision):
    settings = config(phases=PHASES, precision=precision)
    straight = run(mixture("mixture"), settings, data, tmp_path / "straight")
    options = Run(say=lambda text: None, checkpoint_steps=stop)
    run(mixture("mixture"), settings, data, tmp_path / "cut", stop=stop + 1, options=options)
    resumed = run(mixture("mixture"), settings, data, tmp_path / "cut", options=options)
    assert_bit_equal(resumed, straight)
    assert rows(tmp_path / "cut") == rows(tmp_path / "straight")
    assert [row["step"] for row in rows(tmp_path / "cut")] == list(range(1, 9))


def test_a_damaged_snapshot_is_passed_over(data, tmp_path):
    settings, said = config(), []
    straight = run(mixture(), settings, data, tmp_path / "straight")
    options = Run(said.append, checkpoint_steps=2, keep_checkpoints=2)
    run(mixture(), settings, data, tmp_path / "cut", stop=7, options=options)
    newest = tmp_path / "cut" / "checkpoints" / "step-00000006" / "optimizer-00000.safetensors"
    flipped = bytearray(newest.read_bytes())
    flipped[-1] ^= 1
    newest.write_bytes(flipped)
    resumed = run(mixture(), settings, data, tmp_path / "cut", options=options)
    assert_bit_equal(resumed, straight)
    assert any("damaged" in line for line in said) and any("going on from step 4 of 8" in line for line in said)


def test_a_snapshot_that_says_another_step_is_passed_over(data, tmp_path):
    settings, said = config(), []
    straight = run(mixture(), settings, data, tmp_path / "straight")
    options = Run(said.append, checkpoint_steps=2, keep_checkpoints=2)
    run(mixture(), settings, data, tmp_path / "cut", stop=7, options=options)
    state = tmp_path / "cut" / "checkpoints" / "step-00000006" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 7}))
    assert_bit_equal(run(mixture(), settings, data, tmp_path / "cut", options=options), straight)
    assert any("going on from step 4 of 8" in line for line in said)


def test_every_mth_snapshot_stays(data, tmp_path):
    """Of 8 steps in snapshots of each, the newest one and those of steps 3 and 6; the stage's end takes what is not to stay."""
    options = Run(lambda text: None, checkpoint_steps=1, keep_checkpoints=1, keep_every=3)
    run(mixture(), config(), data, tmp_path / "out", options=options)
    root = tmp_path / "out" / "checkpoints"
    assert [path.name for path in snapshots(root)] == ["step-00000003", "step-00000006", "step-00000007"]
    _drop_snapshots(Artifact("x", run, None, {}, "", tmp_path / "out"))
    assert [path.name for path in snapshots(root)] == ["step-00000003", "step-00000006"]
    for path in snapshots(root):
        (path / KEPT).unlink()
    _drop_snapshots(Artifact("x", run, None, {}, "", tmp_path / "out"))
    assert not root.exists()


def test_a_half_written_snapshot_is_not_one(data, tmp_path):
    settings = config()
    straight = run(mixture(), settings, data, tmp_path / "straight")
    run(mixture(), settings, data, tmp_path / "cut", stop=5, options=Run(lambda text: None, checkpoint_steps=4))
    root = tmp_path / "cut" / "checkpoints"
    shutil.copytree(root / "step-00000004", root / "step-00000008.partial")
    assert_bit_equal(run(mixture(), settings, data, tmp_path / "cut"), straight)


def test_one_step_equals_the_slow_twin(data, tmp_path):
    """Loss, clipped gradients and AdamW of the first step, against reference.py on the same batch."""
    options = OptimizerConfig(weight_decay=0.1, clip_norm=0.5)
    settings = config(tokens=4 * 16, optimizer=options, schedule=ScheduleConfig(warmup_steps=0))
    models = dense_models("llama", 1, dtype=torch.float32)
    twin = dense_models("llama", 1, dtype=torch.float64)[0]
    trained = run(models[0], settings, data, tmp_path / "out")
    ids = torch.from_numpy(Batches(data, settings.proportions, 16, 4, settings.rng_seed).batch(0))
    nats, count = reference.next_token_cross_entropy(twin(ids).logits, ids)
    assert count == 4 * 15
    (nats / count).backward()
    named = dict(twin.named_parameters())
    before, gradients = [p.detach() for p in named.values()], [p.grad for p in named.values()]
    wd = [options.weight_decay if decays(name, p) else 0.0 for name, p in named.items()]
    rate = learning_rate(settings, plan_phases(settings), 0)
    after, norm = reference.clip_and_adamw(before, gradients, [{} for _ in wd], rate, decay=wd, max_norm=0.5)
    (row,) = rows(tmp_path / "out")
    assert row["loss"] == pytest.approx((nats / count).item(), rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    for (name, ours), theirs in zip(trained.named_parameters(), after, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, atol=2e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("scope", ["sequence"])
def test_accumulation_changes_nothing(data, tmp_path, scope):
    results = [
        run(mixture(balance_scope=scope), config(tokens=3 * 64, micro_batch_sequences=size), data, tmp_path / str(size))
        for size in (4, 2, 1)
    ]
    for other in results[1:]:
        for (name, a), (_, b) in zip(results[0].named_parameters(), other.named_parameters(), strict=True):
            torch.testing.assert_close(
                a, b, atol=2e-4, rtol=1e-3, msg=name
            )  # Adam's first steps are signs: noise grows
    losses = [[row["loss"] for row in rows(tmp_path / str(size))] for size in (4, 2, 1)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[2] == pytest.approx(losses[0], abs=1e-4)


def test_loss_is_the_sum_of_its_parts_and_health_is_reported(data, tmp_path):
    run(mixture("mixture"), config(), data, tmp_path / "out")
    for row in rows(tmp_path / "out"):
        expected = row["cross_entropy"] + 0.01 * row["balance"] + 0.001 * row["z"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert len(row["load"]) == 2 and all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in row["load"])
        assert 0 < row["ffn_entropy"] <= 1.0987 and 0 < row["attention_entropy"] <= 1.0987
        assert row["router_gradient_norm"] > 0 and row["dead_experts"] >= 0


def test_a_row_tells_gate_sums_logits_and_the_gradients_of_experts(data, tmp_path):
    """The first step's, against the model's own trace and autograd on the same batch."""
    settings = config(tokens=4 * 16, micro_batch_sequences=4, optimizer=OptimizerConfig(clip_norm=0.5))
    choices = {"router": "softmax_topk", "num_experts_per_tok": 1}  # bare gates: they sum to less than 1
    model, trained = mixture("mixture", **choices).train(), mixture("mixture", **choices)
    run(trained, settings, data, tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    ids, trace = (
        torch.from_numpy(Batches(data, settings.proportions, 16, 4, settings.rng_seed).batch(0)),
        RoutingTrace(),
    )
    nats, count = reference.next_token_cross_entropy(model(ids, trace=trace).logits, ids)
    sums = model.auxiliary_sums(trace, ids)
    loss = nats / count + sum(model.auxiliary_coefficients[name] * value / ids.numel() for name, value in sums.items())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    whole = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    experts = sum(gradient.square().sum() for name, gradient in gradients.items() if ".experts." in name).sqrt()
    assert row["gradient_norm"] == pytest.approx(whole.item(), rel=1e-4) and whole > 0.5
    assert row["expert_gradient_norm"] == pytest.approx((experts * 0.5 / whole).item(), rel=1e-4)
    assert row["gate_sum"] == pytest.approx(sum(r.gates.sum(1).mean().item() for r in trace.of("ffn")) / 2, rel=1e-5)
    assert row["gate_sum"] < 0.9
    for part in ("ffn", "attention"):
        sizes = [
            math.sqrt(sum(math.log(sum(map(math.exp, t))) ** 2 for t in r.logits.tolist()) / 64) for r in trace.of(part)
        ]
        assert row[f"{part}_logits"] == pytest.approx(max(sizes), rel=1e-5)
    assert row["attention_load"] == [[0.3333] * 3] * 2  # soft: a token takes all


BIASED = {
    "router": "softmax_topk", "gate_scale": "sum_to_one", "router_options": {"bias_rate": 0.25},
    "attention_router": {"kind": "topk_softmax", "top_k": 2, "bias_rate": 0.5},
}  # fmt: skip


def biases(model):
    """In units of the rate: {part: (layers, E)}."""
    found = {name: buffer for name, buffer in model.named_buffers() if name.endswith("router.bias")}
    return {
        "ffn": torch.stack([b for name, b in found.items() if ".mlp." in name]) / 0.25,
        "attention": torch.stack([b for name, b in found.items() if ".self_attn." in name]) / 0.5,
    }


def test_a_bias_moves_once_a_step_towards_the_mean_load(data, tmp_path):
    """By the loads of the whole step, whatever the micro-batches; recomputed layers do not count twice."""
    found = []
    for micro, checkpointed in ((4, False), (1, False), (2, True)):
        model = mixture("mixture", **BIASED)
        settings = config(tokens=64, micro_batch_sequences=micro, gradient_checkpointing=checkpointed)
        run(model, settings, data, tmp_path / f"{micro}")
        load = torch.tensor(rows(tmp_path / f"{micro}")[0]["load"])
        moved = biases(model)
        assert torch.equal(moved["ffn"], torch.sign((load.mean(1, keepdim=True) - load).round(decimals=3)))
        found.append(moved)
    assert found[0]["attention"].abs().max() == 1
    for other in found[1:]:
        assert torch.equal(other["ffn"], found[0]["ffn"]) and torch.equal(other["attention"], found[0]["attention"])


def test_a_frozen_router_keeps_its_bias(data, tmp_path):
    phases = (PhaseConfig(steps=3), PhaseConfig(frozen=("router",)))
    model = run(mixture("mixture", **BIASED), config(phases=phases), data, tmp_path / "out")
    short = run(mixture("mixture", **BIASED), config(tokens=3 * 64), data, tmp_path / "short")
    for part, moved in biases(model).items():
        assert torch.equal(moved, biases(short)[part]) and moved.abs().max() >= 1


def test_a_bias_balances_a_router_that_prefers_one_expert(data, tmp_path):
    def lopsided(**options):
        model = mixture(**BIASED | options)
        for layer in model.model.decoder.layers:  # the first feature is 1 for every token, and expert 0 likes it
            layer.mlp.router.weight.data.zero_()
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] = 3.0
            model.model.decoder.layers[0].mlp.router.weight[0, 0] = 0.5
        return model

    frozen = (PhaseConfig(frozen=("rest", "attention", "experts")),)
    settings = config(tokens=40 * 64, phases=frozen, lr=1e-6)
    loads = {}
    for rate in (0.0, 0.05):
        out = tmp_path / str(rate)
        run(lopsided(router_options={"bias_rate": rate}), settings, data, out)
        loads[rate] = sum(row["load"][0][0] for row in rows(out)[-12:]) / 12
    assert loads[0.0] == pytest.approx(0.5, abs=0.01)  # one of the two places of every token
    assert abs(loads[0.05] - 1 / 3) < 0.05


def test_a_bias_under_the_logits_of_another_router_is_frozen_with_it(data, tmp_path):
    """tie=sublayers: the feed-forward router has no weights; the attention router's decide whether its bias moves."""
    tied = {"tie": "sublayers"} | BIASED
    for frozen, moves in (((), True), (("router",), False)):
        phases = (PhaseConfig(steps=1, frozen=frozen), PhaseConfig(frozen=("router",)))
        model = run(mixture("mixture", **tied), config(tokens=128, phases=phases), data, tmp_path / str(moves))
        assert all(bool(moved.any()) == moves for moved in biases(model).values())


def test_first_segments_count_in_no_load(data, tmp_path):
    """They all go to the seed's expert, and say nothing of what the router decides."""
    pooled = {"per": "segment", "tokens": 4}
    run(mixture(router_options=pooled), config(tokens=64), data, tmp_path / "out")
    ids = torch.from_numpy(Batches(data, config().proportions, 16, 4, config().rng_seed).batch(0))
    trace = RoutingTrace()
    mixture(router_options=pooled).train()(ids, trace=trace)
    for routing, load in zip(trace.of("ffn"), rows(tmp_path / "out")[0]["load"], strict=True):
        later = routing.experts.view(4, 16, -1)[:, 4:].flatten()
        assert load == pytest.approx((torch.bincount(later, minlength=3) / len(later)).tolist(), abs=1e-3)


def test_routers_that_anneal_are_told_the_step(data, tmp_path, monkeypatch):
    """Also in a run that goes on from a snapshot."""
    told = []

    def trace(**given):
        told.append(given["step"])
        return RoutingTrace(**given)

    monkeypatch.setattr("upcycle.train.RoutingTrace", trace)
    options = Run(say=lambda text: None, checkpoint_steps=2)
    settings = config(tokens=5 * 64, micro_batch_sequences=2)
    run(mixture(), settings, data, tmp_path / "out", stop=3, options=options)
    run(mixture(), settings, data, tmp_path / "out", options=options)
    assert told == [0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4]


def test_a_router_that_is_never_trained_stays_as_drawn(data, tmp_path):
    before = mixture("mixture", router_options={"trained": False})
    drawn = {name: buffer.clone() for name, buffer in before.named_buffers() if "router" in name}
    after = run(before, config(), data, tmp_path / "out")
    assert len(drawn) == 2
    for name, buffer in drawn.items():
        assert torch.equal(after.get_buffer(name), buffer)


def test_gradient_checkpointing_trains_the_same(data, tmp_path):
    plain = run(mixture("mixture"), config(tokens=4 * 64), data, tmp_path / "plain")
    saving = run(mixture("mixture"), config(tokens=4 * 64, gradient_checkpointing=True), data, tmp_path / "saving")
    assert_bit_equal(plain, saving)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_training_lowers_the_loss(data, tmp_path, kind, kv):
    model = mixture_of(dense_models(kind, 3, dtype=torch.float32), attention="mixture", kv=kv)
    run(model, config(tokens=40 * 64), data, tmp_path / "out")
    losses = [row["cross_entropy"] for row in rows(tmp_path / "out")]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5


def test_non_finite_loss_stops_and_keeps_the_last_snapshot(data, tmp_path):
    model = mixture()
    options = Run(lambda text: None, checkpoint_steps=2)
    run(model, config(), data, tmp_path / "out", stop=5, options=options)
    poisoned = mixture()

    def poison(module, args, output):
        return output * float("nan")

    poisoned.lm_head.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match=r"step 4, rank 0: loss nan.*Lower the learning rate"):
        run(poisoned, config(), data, tmp_path / "out", options=options)
    assert (tmp_path / "out" / "checkpoints" / "step-00000004").is_dir()
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2, 3, 4]


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_sequences=4 is not a multiple of micro_batch_sequences=3"):
        config(micro_batch_sequences=3)
