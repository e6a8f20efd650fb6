"""Plans of memory: traces against what hand and engine count, strategies against what they hold, advice against itself."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch import nn

from launch import capacity
from launch.capacity import Models, group_of, print_capacity
from launch.hardware import CPU, DEVICES, Device, device
from launch.planner import Group, checkpoint_bytes, held_bytes, needs, sent_bytes, share
from tests.test_recipes import configured, declared
from tests.tiny import FAMILY_CONFIGS, VOCAB, dense_config, dense_models, mixture_of
from upcycle import cpu_kernels
from upcycle.config import PhaseConfig, ScheduleConfig, TrainConfig
from upcycle.cost import Shape
from upcycle.engines import ENGINES
from upcycle.footprint import Alive, footprint, forward_bytes
from upcycle.optim import parameter_groups
from upcycle.snapshot import snapshots
from upcycle.store import Run
from upcycle.train import train

ROOT = Path(__file__).resolve().parent.parent
TRAIN = TrainConfig(
    tokens=96, proportions={"random": 1.0}, sequence_length=16, batch_sequences=2, micro_batch_sequences=2, lr=1e-3,
    precision="fp32", schedule=ScheduleConfig(kind="constant", warmup_steps=0), max_epochs=float("inf"),
)  # fmt: skip
ROUTED = [
    {"router": "topk_softmax"},
    {"router": "sample_top1"},
    {"router": "switch"},
    {"router": "soft", "attention": "mixture"},
    {"router": "topk_softmax", "attention": "mixture", "kv": "shared", "shared_expert": "seed", "shared_gate": "half"},
]
MADE = Device(10**9, 1e12, 1e11, 1e9, runtime=0)


def mixture(**choice):
    return mixture_of(dense_models("llama", 3, dtype=torch.float32), **choice)


class Chain(nn.Module):
    """x -> tanh(x) -> its square's sum; tanh saves its output, the square its input: one and the same."""

    def forward(self, x):
        return x.tanh().square().sum()


def test_what_is_alive_is_counted_and_let_go():
    x = torch.zeros(1000, requires_grad=True)
    with Alive(nn.Module()) as alive:
        kept = Chain()(x)
        assert alive.now == 4000 + 4  # tanh's output and the sum; the square has gone
        assert alive.activations == 2 * 4000 + 4
        kept.backward()
        assert alive.now == 4000 + 4 and x.grad is not None  # the output has given way to the gradient
        assert alive.activations == 4 * 4000 + 8


def test_gradients_come_while_activations_go():
    """Three layers without biases: forward keeps three inputs' products, and each gradient is as large as its weight."""
    layers = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(3)))
    x = torch.zeros(50, 100, requires_grad=True)
    with Alive(layers) as alive:
        out = layers(x).sum()
        outputs = alive.now
        assert outputs == 2 * 50 * 100 * 4 + 4  # the last layer's output is not kept: a sum needs no values
        out.backward()
    alive.over()
    assert alive.gradients == 3 * 100 * 100 * 4
    assert outputs < alive.activations < outputs + alive.gradients  # gradients that are done are counted apart


@pytest.mark.parametrize("kind", [*FAMILY_CONFIGS])
def test_every_family_is_traced(kind):
    config = dense_config(kind)
    found = footprint(config, TRAIN)
    assert found.numel() == Shape.of_config(config.to_dict()).parameters
    assert found.trained == found.ever_trained == tuple(found.shapes)
    assert found.activations > 2 * 16 * VOCAB * 4  # the logits at least


@pytest.mark.parametrize("choice", ROUTED, ids=lambda choice: "-".join(map(str, choice.values())))
def test_every_kind_of_mixture_is_traced(choice):
    config = mixture(**choice).config
    found = footprint(config, TRAIN)
    assert found.numel() == Shape.of_config(config.to_dict()).parameters
    assert found.activations > footprint(dense_config("llama"), TRAIN).activations


def test_a_trace_is_what_a_step_with_values_keeps():
    """The same count over a real forward and backward."""
    from upcycle.train import Objective

    model = mixture(router="topk_softmax").train()
    alive = Alive(model)
    tokens, domains, count = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long), torch.tensor(32)
    with alive:
        Objective(model, "fp32", 1)(tokens, domains, count, count, 0)["loss"].backward()
    found = footprint(model.config, TRAIN)
    assert 0 <= found.activations - alive.activations <= 64  # a few numbers are tensors of one element there


@pytest.mark.parametrize(("length", "kept"), [(64, True), (128, False)])  # of heads of size 8
def test_on_cpus_attention_keeps_its_probabilities_where_they_are_few(length, kept, monkeypatch):
    """Of 4 heads in 2 layers, in blocks; beside what SDPA keeps, one number a query less."""
    monkeypatch.setattr(cpu_kernels, "BLOCK", 16)
    config, train = dense_config("llama"), replace(TRAIN, sequence_length=length)
    more = footprint(config, train, cpu=True).activations - footprint(config, train).activations
    probabilities = 4 * 2 * 4 * 2 * sum(16 * stop for stop in range(16, length + 1, 16))
    assert (more > 0.7 * probabilities) == kept


def test_longer_micro_batches_keep_more_and_checkpointing_less():
    config = dense_config("llama", num_hidden_layers=8)
    one = footprint(config, TRAIN)
    assert footprint(config, replace(TRAIN, micro_batch_sequences=1)).activations < 0.6 * one.activations
    assert footprint(config, replace(TRAIN, gradient_checkpointing=True)).activations < 0.6 * one.activations
    assert forward_bytes(config, 2, 16, "fp32")[1] < one.activations


def test_without_a_backward_that_needs_them_no_copies_of_weights_are_kept():
    """Of 8 layers' weights in bf16, a forward without a graph and one with checkpointing keep no more than one layer's at a time."""
    config = dense_config("llama", num_hidden_layers=8, hidden_size=256, intermediate_size=1024)
    train = replace(TRAIN, precision="bf16")
    copies = 2 * footprint(config, train).numel() - 2 * 2 * VOCAB * 256
    assert footprint(config, train).activations > copies
    assert forward_bytes(config, 2, 16, "bf16")[1] < copies / 4
    assert footprint(config, replace(train, gradient_checkpointing=True)).activations < copies / 2


def test_phases_count_by_what_they_train():
    config = mixture(router="topk_softmax").config
    router, experts = PhaseConfig(steps=1, trainable=("router",)), PhaseConfig(trainable=("experts",))
    found = footprint(config, replace(TRAIN, phases=(router, experts)))
    assert all(".experts." in name for name in found.trained)
    assert {name for name in found.ever_trained if ".router." in name}
    held = held_bytes(found, Group("single", 1, MADE, 1.0, 1.0))
    assert held.gradients == 4 * found.numel(found.trained)
    assert held.moments == 8 * found.numel(found.ever_trained) < 8 * found.numel()


@pytest.mark.parametrize("biased", [False, True])
def test_a_checkpoint_has_just_so_many_bytes(tmp_path, biased):
    rule = {"bias_rate": 0.01} if biased else {}
    model = mixture(router="topk_softmax", router_options=rule)
    from evals.throughput import random_domain

    data = {"random": random_domain(tmp_path / "random", VOCAB, TRAIN)}
    run = Run(say=lambda text: None, checkpoint_seconds=None, checkpoint_steps=2)
    engine = train(model, TRAIN, data, tmp_path, run, 1.0)
    found = footprint(model.config, TRAIN)
    group = Group("single", 1, MADE, 1.0, 1.0)
    assert engine.optimizer_bytes() == held_bytes(found, group).moments
    (snapshot,) = snapshots(tmp_path / "checkpoints")
    stored = 0
    for file in [*snapshot.glob("model-*.safetensors"), *snapshot.glob("optimizer-*.safetensors")]:
        with safe_open(file, framework="pt") as tensors:
            stored += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())
    assert checkpoint_bytes(found) == stored
    engine.close()
    assert type(engine) is ENGINES["single"]


def test_flat_buffers_are_those_of_the_optimizers_groups():
    model = mixture(router="topk_softmax")
    found = footprint(model.config, TRAIN)
    group = Group("zero2", 3, MADE, 1.0, 1.0)
    sizes = [sum(parameter.numel() for parameter in one["params"]) for one in parameter_groups(model, TRAIN)]
    assert share(found, found.shapes, group) == sum(-(-size // 6) * 2 for size in sizes)


def test_traffic_by_hand():
    found = footprint(dense_config("llama"), TRAIN)
    x = 4 * found.numel()
    for strategy, factor in {"single": 0, "ddp": 2, "zero1": 3, "zero2": 5, "zero3": 6, "fsdp2": 6}.items():
        group = Group(strategy, 1 if strategy == "single" else 4, MADE, 1.0, 1.0)
        assert sent_bytes(found, group, rounds=2) == int(factor * x * 3 / 4)


def test_time_is_arithmetic_over_what_is_reached_and_traffic_over_the_link():
    config = dense_config("llama")
    found, shape = footprint(config, TRAIN), Shape.of_config(config.to_dict())
    train = replace(TRAIN, batch_sequences=8, tokens=1024)

    def seconds(strategy, link=1e15, train=train):
        return needs(shape, found, train, Group(strategy, 2, MADE, link, 0.5)).step_seconds

    computing = 128 * shape.step_flops_per_token(16, 2) / (2 * 1e11 * 0.5)
    assert seconds("ddp") == pytest.approx(computing)
    assert seconds("ddp", train=replace(train, gradient_checkpointing=True)) == pytest.approx(computing * 4 / 3)
    sent = 2 * 4 * found.numel() / 2
    assert seconds("ddp", link=1.0) == pytest.approx(sent)  # beside the backward
    assert seconds("zero2", link=1.0) == pytest.approx(computing + 2.5 * sent)  # after it
    assert needs(shape, found, train, Group("ddp", 2, MADE, 1e15, 0.5)).hours == pytest.approx(8 * computing / 3600)


def test_partitions_shrink_with_ranks_and_offload_leaves_the_device():
    found = footprint(dense_config("llama"), TRAIN)

    def held(strategy, ranks=4, offload=False):
        return held_bytes(found, Group(strategy, ranks, MADE, 1.0, 1.0, offload))

    whole, every = held("ddp"), 4 * found.numel()
    assert (whole.weights, whole.gradients, whole.moments, whole.buffers) == (every, every, 2 * every, 0)
    assert held_bytes(found, Group("ddp", 4, MADE, 1.0, 1.0), rounds=2).buffers == every
    for strategy, parts in {"zero1": (1, 1, 4), "zero2": (1, 4, 4), "zero3": (4, 4, 4), "fsdp2": (4, 4, 4)}.items():
        one = held(strategy)
        for size, full, part in zip(
            (one.weights, one.gradients, one.moments), (every, every, 2 * every), parts, strict=True
        ):
            assert full / part <= size <= 1.02 * full / part + 256
    for strategy in ("zero2", "zero3"):
        there, gone = held(strategy), held(strategy, offload=True)
        assert gone.moments == gone.copies == 0 < gone.host
        assert gone.on_device < there.on_device <= gone.on_device + gone.host + there.buffers


def shown(*overrides):
    cfg = configured(*overrides)
    console = Console(file=io.StringIO(), width=80)
    print_capacity(cfg, declared(*overrides), console)
    text = console.file.getvalue()
    assert "…" not in text  # no figure is cut
    return text


def test_the_plan_says_what_fits():
    text = shown("launch.gpu=h100-80")
    assert "one process on h100-80: 85.9GB each, 989TFLOP/s in bf16" in text and "TOO MUCH" not in text
    rows = [line.split()[0] for line in text.splitlines() if " fits " in line]
    assert "seed" in rows and "mix/btx" in rows and "mix/bam" in rows and "eval/seed" in rows
    assert "branch/code +2" in text


def test_advice_is_followed_until_it_fits(monkeypatch):
    """What is advised, given as settings, fits by the same plan."""
    small = replace(DEVICES["h100-80"], memory=300_000_000, runtime=0)
    monkeypatch.setitem(DEVICES, "small", small)
    text = shown("launch.gpu=small", "mix.micro_batch_sequences=32")
    (line,) = [line for line in text.splitlines() if line.startswith("mix/bam needs")]
    changes = line.partition(": ")[2].partition(" brings it to")[0].split(", ")
    assert "mix.gradient_checkpointing=true" in changes[0]
    again = shown("launch.gpu=small", "mix.micro_batch_sequences=32", *changes)
    (row,) = [line for line in again.splitlines() if line.startswith("mix/bam ")]
    assert "fits" in row
    monkeypatch.setitem(DEVICES, "none", replace(small, memory=1000))
    assert "take a larger device, or a smaller mixture" in shown("launch.gpu=none", "mix.micro_batch_sequences=1")


def test_batches_that_cannot_be_shared_are_said():
    group = ("launch.gpu=h100-80", "launch.config=zero3", "launch.processes=64")
    assert "64 processes cannot share batches of" in shown(*group)


@pytest.mark.parametrize(
    "launch, expected",
    [
        (["launch.config=ddp", "launch.processes=8"], ("ddp", 8, 450e9)),
        (["launch.config=zero3", "launch.processes=64"], ("zero3", 64, 50e9)),
        (["launch.config=zero3", "launch.processes=64", "launch.interconnect=100"], ("zero3", 64, 12.5e9)),
        (["launch=slurm", "launch.config=zero2", "launch.nodes=2", "launch.gpus=4"], ("zero2", 8, 50e9)),
        (["launch=slurm", "launch.config=zero2", "launch.gpus=4"], ("zero2", 4, 450e9)),
    ],
)
def test_groups_and_their_slowest_link(launch, expected):
    found = group_of(configured("launch.gpu=h100-80", *launch).launch, "mix")
    assert (found.strategy, found.ranks, found.link) == expected


def test_branches_side_by_side_share_the_processes_and_the_memory():
    launch = configured(
        "launch.gpu=h100-80", "launch.config=ddp", "launch.processes=8", "launch.parallel_branches=4"
    ).launch
    assert (group_of(launch, "branch").ranks, group_of(launch, "mix").ranks) == (2, 8)
    alone = group_of(configured("launch.gpu=cpu").launch, "branch")
    beside = group_of(configured("launch.gpu=cpu", "launch.parallel_branches=2").launch, "branch")
    assert beside.device.memory == alone.device.memory // 2


def test_an_ensemble_holds_all_its_models():
    rows = {
        line.split()[0]: line.split()
        for line in shown("launch.gpu=h100-80", "btm={top_k: null}").splitlines()
        if " fits " in line
    }
    assert rows["eval/btm"][1] == "34.6MB" and rows["eval/seed"][2] == "8.66MB"


def test_what_more_processes_can_do_is_tried_on_devices_only(monkeypatch):
    monkeypatch.setitem(DEVICES, "small", replace(DEVICES["h100-80"], memory=30_000_000, runtime=0))
    group = ("launch.config=zero2", "launch.processes=2")
    text = shown("launch.gpu=small", *group)
    assert "launch.config=zero3" in text and "launch.offload=cpu" in text
    monkeypatch.setattr(
        "launch.capacity.device", lambda name, processes: Device(30_000_000, 1e9, 1e9, 1e9, 0, cpu=True)
    )
    text = shown("launch.gpu=cpu", *group)
    assert "launch.config=zero3" in text and "launch.offload" not in text and "launch.processes" not in text
    text = shown("launch.gpu=cpu", "launch=slurm", "launch.config=zero2", "launch.gpus=2")
    assert "launch.config=zero3" in text


def test_a_kind_of_job_may_have_processes_of_its_own():
    options = ["launch=slurm", "launch.config=zero2", "launch.gpus=4", "+launch.kinds={branch: {gpus: 2}}"]
    launch = configured("launch.gpu=h100-80", *options).launch
    assert (group_of(launch, "branch").ranks, group_of(launch, "mix").ranks) == (2, 4)


def test_an_unknown_device_is_refused_with_the_settings():
    with pytest.raises(ValueError, match=r"gpu=h100: expected one of .*h100-80.*did you mean h100-80"):
        configured("launch.gpu=h100")


def test_what_only_values_say_is_not_planned_and_the_rest_is():
    layer = ("assemble@mixtures.btx.assemble=camex_layer", "mixtures.btx.assemble.router.pool.tokens=16")
    text = shown("experiment=tiny", "launch.gpu=h100-80", *layer)
    assert "mix/btx: weights are merged once for each decision" in text and "eval/btx: weights" in text
    assert [line for line in text.splitlines() if line.startswith("mix/bam ") and " fits " in line]


def test_this_machine_is_a_device_too():
    found = device(CPU, 2)
    assert found.memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    assert found.bf16 > 1e8 and found.fp32 > 1e8


def test_models_alike_are_traced_once(monkeypatch):
    calls = []
    monkeypatch.setattr(capacity, "footprint", lambda *given: calls.append(given) or footprint(*given))
    cfg = configured("launch.gpu=h100-80")
    models = Models(cfg, declared("launch.gpu=h100-80"))
    group = group_of(cfg.launch, "mix")
    for ranks in (1, 8):
        models.needs(models.config("btx"), TRAIN, replace(group, ranks=ranks))
    assert len(calls) == 1


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """A model of 103M parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 18, "num_attention_heads": 10}
    config = LlamaConfig(vocab_size=32768, num_key_value_heads=5, tie_word_embeddings=True, **sizes)
    where = tmp_path_factory.mktemp("large")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(where)
    return where


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "zero2", "zero3"])
def test_peak_memory_is_within_15_percent(large, strategy):
    ranks = 1 if strategy == "single" else 2
    options = ["--strategy", strategy, "--processes", str(ranks), "--sequences", "2", "--length", "256"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.peak_memory", str(large), *options],
        cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["parameters"] >= 100_000_000
    assert abs(row["planned"] / row["measured"] - 1) <= 0.15, row
