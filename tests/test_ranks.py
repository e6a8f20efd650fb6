"""Two real processes under every strategy, over gloo: they train what one process trains, go on from one another's
snapshots, and leave the same directory.

The last test compares the table in docs/distributed.md with what ran; UPCYCLE_WRITE_TABLES=1 writes it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from transformers import AutoConfig

from launch.hardware import DEVICES
from launch.planner import Group, held_bytes
from tests.crashes import run_again_after_a_fault
from tests.domains import two_domains
from tests.ranks import run_job
from tests.tables import assert_table
from tests.tiny import dense_models, mixture_of
from upcycle.checkpoint import Checkpoint
from upcycle.config import TrainConfig
from upcycle.families import FAMILIES
from upcycle.footprint import footprint

ROOT = Path(__file__).resolve().parent.parent
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
# Those that take modules apart: what they do depends on how a family builds its layers.
FAMILY_STRATEGIES = ("single", "zero3", "fsdp2")
ENGINES = {
    "ddp": "DistributedDataParallel", "fsdp2": "FSDPObjective", "zero1": "DeepSpeedEngine", "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}  # fmt: skip
shown: dict[tuple[str, str], bool] = {}  # what the tests of a strategy have found: (strategy, claim)
trained: dict[str, set[str]] = {}
resumed: dict[str, set[int]] = {}

TRAIN = {
    "tokens": 20 * 4 * 16, "proportions": {"low": 0.5, "high": 0.5}, "sequence_length": 16, "batch_sequences": 4,
    "micro_batch_sequences": 1, "lr": 3e-3, "schedule": {"warmup_steps": 2}, "precision": "fp32",
    "phases": [
        {"steps": 4, "trainable": ["router"], "lr": 1e-2},
        {"steps": 8, "frozen": [r"layers\.0\.mlp\.experts"]},
        {"frozen": ["router"]},
    ],
}  # fmt: skip
BALANCED = {"balance": "btx", "balance_coefficient": 0.1, "z_coefficient": 0.01}
MIXTURES = {  # kind of seed, choices of the mixture, settings of the training
    "btx": ("llama", {"num_experts_per_tok": 2, "router": "topk_softmax"}, {}),
    "bam": ("llama", {"attention": "mixture", "balance": "switch"}, {"gradient_checkpointing": True}),
    "bam_shared_kv": ("family/qwen3", {"attention": "mixture", "kv": "shared", "balance_scope": "micro_batch"}, {}),
    "bam_fused": ("gpt_neox", {"attention": "mixture"}, {"precision": "bf16", "gradient_checkpointing": True}),
    "biased": (
        "llama",
        {
            "attention": "mixture", "tie": "skip", "router": "softmax_topk", "gate_scale": "sum_to_one",
            "router_options": {"bias_rate": 0.01}, "similarity_coefficient": 0.1, "entropy_coefficient": 0.01,
            "attention_router": {"kind": "topk_softmax", "top_k": 2, "bias_rate": 0.01},
        },
        {},
    ),
    "segments": (
        "gpt_neox",
        {
            "attention": "mixture", "router_options": {"per": "segment", "tokens": 4},
            "attention_router": {"per": "prefix", "tokens": 4},
        },
        {"gradient_checkpointing": True},
    ),
    "choosing": (
        "llama",
        {
            "attention": "mixture", "router": "expert_choice", "balance": "none",
            "attention_router": {"kind": "topk_softmax", "top_k": 2, "trained": False},
        },
        {},
    ),
    # One micro-batch of all ranks is one of the single process only where there is one a step.
    "global": ("llama", {"balance_scope": "global"}, {"micro_batch_sequences": 2}),
}  # fmt: skip


LOSSES = (
    "loss",
    "cross_entropy",
    *[part + name for part in ("", "attention_") for name in ("balance", "z", "similarity", "entropy")],
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Models, data, and what one process makes of them."""
    root = tmp_path_factory.mktemp("ranks")
    two_domains(root / "data")
    for name, (kind, choices, _) in MIXTURES.items():
        torch.manual_seed(3)
        mixture_of(dense_models(kind, 3, dtype=torch.float32), **BALANCED | choices).save_pretrained(root / name)
    starved = mixture_of(dense_models("llama", 3, dtype=torch.float32), **BALANCED)
    starve(starved).save_pretrained(root / "starved")
    for kind in FAMILIES:
        models = dense_models(f"family/{kind}", 2, dtype=torch.float32)
        kernel = "eager" if kind == "gemma2" else "sdpa"  # transformers refuses sdpa for it
        mixture_of(models, implementation=kernel, attention="mixture", **BALANCED).save_pretrained(
            root / f"family-{kind}"
        )
    for one in jobs(root, "single"):
        run_job(one)
    return root


def starve(mixture):
    """Expert 2 gets tokens of the upper half of the vocabulary only (domain "high"), by a feature of the embedding."""
    with torch.no_grad():
        embedding = mixture.get_input_embeddings().weight
        embedding[:, 0] = 0.1
        embedding[embedding.shape[0] // 2 :, 0] = 8.0
        for layer in mixture.model.decoder.layers:
            layer.mlp.router.weight.zero_()
            layer.mlp.router.weight[2, 0] = 5.0
    return mixture


def job(root: Path, name: str, strategy: str, model: str, **changes) -> dict:
    train = TRAIN | changes.pop("train", {})
    data = {domain: str(root / "data" / domain) for domain in ("low", "high")}
    return {"model": str(root / model), "data": data, "out": str(root / strategy / name), "train": train} | changes


def jobs(root: Path, strategy: str) -> list[dict]:
    """What every strategy is asked to do, and one process too."""
    found = []
    for name, (_, _, settings) in MIXTURES.items():
        if strategy == "single" and name == "global":
            settings = settings | {"micro_batch_sequences": 4}
        elif strategy == "single" and name == "bam_shared_kv":
            settings = settings | {"micro_batch_sequences": 1}
        found.append(job(root, name, strategy, name, train=settings))
        # Adam's first step is nearly the gradient's sign, which rounding turns where the gradient is 0; not with this eps.
        one_step = settings | {"tokens": 64, "phases": [{}], "optimizer": {"eps": 1e-3}}
        found.append(job(root, f"{name}-1", strategy, name, train=one_step, persistence_threshold=100_000))
    found.append(job(root, "fp32", strategy, "bam_fused", train=MIXTURES["bam_fused"][2] | {"precision": "fp32"}))
    found.append(job(root, "starved", strategy, "starved", train={"phases": [{}]}))
    for kind in FAMILIES if strategy in FAMILY_STRATEGIES else ():
        found.append(job(root, f"family-{kind}", strategy, f"family-{kind}", train={"tokens": 128, "phases": [{}]}))
    # Stopped in each phase and at a boundary, with a snapshot before it.
    for stop in (3, 8, 13):
        cut = {"checkpoint_steps": 3 if stop == 3 else 4}
        found.append(job(root, f"cut-{stop}", strategy, "bam", train=MIXTURES["bam"][2], stop=stop + 1, **cut))
        found.append(job(root, f"cut-{stop}", strategy, "bam", train=MIXTURES["bam"][2], **cut))
    found.append(job(root, "half", strategy, "bam", train=MIXTURES["bam"][2], stop=14, checkpoint_steps=13))
    return found


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def launcher(config: str, processes: int, options: list[str], file: Path) -> list[str]:
    """The command that a user would type."""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"launch/accelerate/{config}.yaml"),
        "--num_processes", str(processes), *options, str(ROOT / "tests" / "ranks.py"), str(file),
    ]  # fmt: skip


def launch(jobs: list[dict], root: Path, strategy: str, options: list[str] | None = None, processes: int = 2) -> None:
    """Two processes do the jobs; those that are done stay so if a fault ends one of them."""
    file = root / f"{strategy}-{len(list(root.glob('*.json')))}.json"
    file.write_text(json.dumps(jobs))
    words = launcher(strategy, processes, options or [], file)
    done = run_again_after_a_fault(
        lambda: subprocess.run(words, env=environment(), cwd=root, capture_output=True, text=True, timeout=400)
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module", params=STRATEGIES)
def strategy(request, shop) -> str:
    """A strategy whose two processes have done all jobs."""
    halves = [
        job(shop, "from-single", request.param, "bam", train=MIXTURES["bam"][2]),
        job(shop, "alone", request.param, "btx", train={"phases": [{}]}, unsynchronised=True),
    ]
    shutil.copytree(shop / "single" / "half", shop / request.param / "from-single")
    launch(jobs(shop, request.param) + halves, shop, request.param)
    return request.param


def rows(out: Path) -> list[dict]:
    timings = ("tokens_per_second", "peak_share")
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timings} for row in found]


def facts(out: Path) -> dict:
    return json.loads((out / "facts.json").read_text())


def weights(out: Path) -> dict[str, torch.Tensor]:
    found = Checkpoint(out)
    return {name: found.get(name) for name in found.names}


def largest_difference(ours: list[dict], theirs: list[dict], keys=LOSSES) -> float:
    """Of the losses in every step; both runs must have the same ones."""
    assert len(ours) == len(theirs) > 0 and all(set(a) == set(b) for a, b in zip(ours, theirs, strict=True))
    return max(abs(a[key] - b[key]) for a, b in zip(ours, theirs, strict=True) for key in keys if key in a)


@pytest.mark.slow
@pytest.mark.parametrize("mixture", MIXTURES)
def test_two_ranks_train_what_one_process_trains(shop, strategy, mixture):
    ours, single = rows(shop / strategy / mixture), rows(shop / "single" / mixture)
    bf16, allowed = MIXTURES[mixture][2].get("precision") == "bf16", 1e-4
    if bf16:
        # A sum over ranks may round the other way, which grows with the steps: as far off as bf16 is from fp32, at most.
        allowed = largest_difference(single, rows(shop / "single" / "fp32"))
    if bf16 and strategy != "zero3":  # DeepSpeed's linear for ZeRO-3 rounds before it adds a bias, at once
        assert largest_difference(ours[:3], single[:3]) <= 1e-4
    assert largest_difference(ours, single) <= allowed
    for a, b in zip(ours, single, strict=True):
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=0.05 if bf16 else 1e-3)
        for norm in ("router_gradient_norm", "expert_gradient_norm"):
            assert a[norm] == pytest.approx(b[norm], rel=0.1 if bf16 else 1e-3, abs=1e-6), norm
        for name in ("ffn_information", "ffn_information_shuffled"):
            assert bf16 or a[name] == pytest.approx(b[name], rel=1e-2, abs=1e-4), name
    if not bf16:
        first, theirs = weights(shop / strategy / f"{mixture}-1"), weights(shop / "single" / f"{mixture}-1")
        for name, tensor in theirs.items():
            torch.testing.assert_close(first[name], tensor, msg=lambda text, name=name: f"{name}: {text}")
    trained.setdefault(strategy, set()).add(mixture)
    shown[strategy, "equal"] = trained[strategy] == set(MIXTURES)


@pytest.mark.slow
def test_the_engine_is_what_was_asked_for_and_its_state_is_partitioned(shop, strategy):
    found, single = facts(shop / strategy / "btx"), facts(shop / "single" / "btx")
    assert found["engine"] == ENGINES[strategy]
    assert found["zero_stage"] == (int(strategy[-1]) if strategy.startswith("zero") else None)
    (whole,) = single["optimizer_bytes"]
    if strategy == "ddp":
        assert found["optimizer_bytes"] == [whole, whole]
        return
    assert whole <= sum(found["optimizer_bytes"])  # nothing is lost; DeepSpeed pads its buffers
    for share in found["optimizer_bytes"]:
        assert share <= 0.55 * whole


@pytest.mark.slow
def test_moments_are_those_of_the_plan_to_the_byte(shop, strategy):
    """Of a run with one phase, on the rank that holds most."""
    train = TypeAdapter(TrainConfig).validate_python(TRAIN | {"phases": [{}]})
    trace = footprint(AutoConfig.from_pretrained(shop / "starved"), train)
    plan = held_bytes(trace, Group(strategy, 2, DEVICES["h100-80"], 1.0, 1.0))
    assert max(facts(shop / strategy / "starved")["optimizer_bytes"]) == plan.moments


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("strategy", FAMILY_STRATEGIES[1:], indirect=True)
def test_every_family_trains(shop, strategy, kind):
    ours, single = (rows(shop / where / f"family-{kind}") for where in (strategy, "single"))
    for a, b in zip(ours, single, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


@pytest.mark.slow
def test_without_exchange_of_gradients_the_comparison_fails(shop, strategy):
    straight = rows(shop / "single" / "alone") if (shop / "single" / "alone").exists() else None
    if straight is None:
        run_job(job(shop, "alone", "single", "btx", train={"phases": [{}]}))
        straight = rows(shop / "single" / "alone")
    assert largest_difference(rows(shop / strategy / "alone"), straight) > 1e-3


@pytest.mark.slow
def test_an_expert_without_a_token_on_one_rank(shop, strategy):
    ours, single = rows(shop / strategy / "starved"), rows(shop / "single" / "starved")
    assert largest_difference(ours, single) <= 1e-4
    assert 0 < ours[0]["load"][0][2] < 0.5  # some tokens go to it, of one domain only


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 8, 13])
def test_resume_equals_the_straight_run(shop, strategy, stop):
    cut, straight = shop / strategy / f"cut-{stop}", shop / strategy / "bam"
    assert rows(cut) == rows(straight)
    assert any(
        f"going on from step {stop if stop == 3 else stop // 4 * 4} of 20" in line for line in facts(cut)["said"]
    )
    ours, theirs = load_file(cut / "model.safetensors"), load_file(straight / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    resumed.setdefault(strategy, set()).add(stop)
    shown[strategy, "resumes"] = resumed[strategy] == {3, 8, 13}


@pytest.mark.slow
def test_snapshots_go_from_two_ranks_to_one_process_and_back(shop, strategy):
    single = rows(shop / "single" / "bam")
    assert largest_difference(rows(shop / strategy / "from-single"), single) <= 1e-4
    assert facts(shop / strategy / "from-single")["said"] == ["going on from step 13 of 20"]
    there = shop / strategy / "to-single"
    shutil.copytree(shop / strategy / "half", there)
    run_job(job(shop, "to-single", strategy, "bam", train=MIXTURES["bam"][2]))
    assert largest_difference(rows(there), single) <= 1e-4 and len(rows(there)) == 20
    ours, theirs = weights(there), weights(shop / "single" / "bam")
    for name, tensor in theirs.items():  # after 20 steps of Adam rounding has grown
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    shown[strategy, "reshards"] = True


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_state_trains_the_same(shop, stage):
    """Moments (and weights, under ZeRO-3) kept by the CPU, on a CPU: the code paths, and no memory saved."""
    one = job(shop, "offloaded", f"zero{stage}", "bam", train=MIXTURES["bam"][2], checkpoint_steps=6)
    options = ["--offload_optimizer_device", "cpu"] + (["--offload_param_device", "cpu"] if stage == 3 else [])
    launch([one | {"stop": 8}, one], shop, f"zero{stage}", options=options)
    assert largest_difference(rows(shop / f"zero{stage}" / "offloaded"), rows(shop / "single" / "bam")) <= 1e-4
    assert facts(shop / f"zero{stage}" / "offloaded")["said"] == ["going on from step 6 of 20"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "zero2", "fsdp2"])
def test_a_group_of_one_is_one_process(shop, name):
    launch([job(shop, "one", name, "btx")], shop, name, processes=1)
    assert largest_difference(rows(shop / name / "one"), rows(shop / "single" / "btx")) <= 1e-5


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others(shop):
    """While these wait in an exchange for it, with the error said."""
    with pytest.raises(AssertionError, match="rank 1 fails here"):
        launch([job(shop, "failing", "zero2", "btx", fails={"rank": 1, "step": 3})], shop, "zero2")
    assert (
        len(rows(shop / "zero2" / "failing")) == 3 and not (shop / "zero2" / "failing" / "model.safetensors").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "zero2", "fsdp2"])
def test_two_machines_train_what_one_process_trains(shop, name):
    """The multi-machine launch files, with two launchers here as two machines of one process each."""
    one, port = job(shop, "machines", name, "btx"), free_port()
    file = shop / f"machines-{name}.json"
    file.write_text(json.dumps([one]))
    launchers = []
    for rank in (0, 1):
        options = ["--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        words = launcher(f"{name}_multinode", 2, [*options, "--main_process_port", str(port)], file)
        launchers.append(
            subprocess.Popen(words, env=environment(), cwd=shop, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )
    try:
        for one in launchers:
            _, errors = one.communicate(timeout=200)
            assert one.returncode == 0, errors.decode()[-3000:]
    finally:
        for one in launchers:
            one.kill()
    assert largest_difference(rows(shop / name / "machines"), rows(shop / "single" / "btx")) <= 1e-4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_the_directory_is_the_same_whatever_trained_it(shop, strategy):
    ours, single = shop / strategy / "bam", shop / "single" / "bam"

    def files(directory: Path) -> dict[str, bytes]:
        skipped = {"metrics.jsonl", "facts.json", "model.safetensors"}
        return {
            path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name not in skipped
        }

    assert files(ours) == files(single) and "config.json" in files(ours)
    a, b = Checkpoint(ours), Checkpoint(single)
    assert a.names == b.names
    assert all((a.shape(n), a.stored_dtype(n)) == (b.shape(n), b.stored_dtype(n)) for n in a.names)


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_ran():
    claims = ("equal", "resumes", "reshards")
    if {strategy for strategy, _ in shown} != set(STRATEGIES):
        pytest.skip("the table is compared after all strategies have run")
    rows = [[one, *("yes" if shown.get((one, claim)) else "no" for claim in claims)] for one in STRATEGIES]
    assert_table("distributed.md", "table", ["strategy", *claims], rows)
