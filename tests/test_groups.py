"""Stages made by groups of processes, as a user starts them; what is refused; and what happens when a process dies."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from launch.branches import shares
from launch.config import LaunchConfig
from launch.groups import FILES, command, launch_file, processes_of, strategy_of, visible_gpus
from tests.crashes import run_again_after_a_fault
from tests.test_launch import ROOT, TINY, upcycle, weights
from tests.test_ranks import free_port
from upcycle.config import TrainConfig
from upcycle.phases import check_ranks
from upcycle.team import STRATEGIES, asked_strategy

WALK = [
    *TINY, "~mixtures.btx", "~mixtures.btx_top1", "~mixtures.btx_random", "~mixtures.bam_shared_kv", "dense=null", "soup=false",
    "branch.micro_batch_sequences=4", "mix.tokens=12288", "merge=fisher", "curvature.sequences=5",
]  # fmt: skip
GROUP = ["launch=accelerate", "launch.processes=2"]


def environment(**changes: str) -> dict[str, str]:
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONFAULTHANDLER": "1"}
    return os.environ | fixed | changes


def accelerate(
    config: str, *arguments: str, cwd: Path, processes: int = 2, options: tuple[str, ...] = (), **changes: str
):
    """`accelerate launch` by hand."""
    words = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES / f"{config}.yaml"),
        "--num_processes", str(processes), *options, *arguments,
    ]  # fmt: skip
    settings = {"cwd": cwd, "env": environment(**changes), "capture_output": True, "text": True, "timeout": 200}
    return run_again_after_a_fault(lambda: subprocess.run(words, **settings))


# What the settings mean ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machines", [1, 4])
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_launch_file_asks_for_its_own_strategy(name, machines):
    launch = LaunchConfig(config=name, machines=machines, processes=32, main_address="first:29500")
    assert strategy_of(launch_file(launch)) == name
    assert launch_file(launch).stem == name + ("_multinode" if machines > 1 else "")


def test_there_is_a_launch_file_for_every_strategy():
    names = {path.stem for path in FILES.glob("*.yaml")}
    several = {name for name in STRATEGIES if name != "single"}
    assert names == {"cpu"} | several | {f"{name}_multinode" for name in several}
    assert strategy_of(FILES / "cpu.yaml") == "single"


def test_a_launch_file_of_ones_own(tmp_path):
    json_file, own = tmp_path / "ds.json", tmp_path / "own.yaml"
    json_file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    own.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {json_file}}}\n")
    assert strategy_of(launch_file(LaunchConfig(config=str(own)))) == "zero1"
    own.write_text("distributed_type: FSDP\n")
    with pytest.raises(ValueError, match=r"FSDP of version 1: expected version 2; set fsdp_config.fsdp_version: 2"):
        strategy_of(own)
    own.write_text("[")
    with pytest.raises(ValueError, match="not a launch file of Accelerate"):
        strategy_of(own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "zero4"}, r"launch.config=zero4: neither a file nor one of cpu, ddp.*did you mean zero"),
        ({"config": "ddp"}, r"launch.config=ddp without a GPU: say how many processes"),
        ({"config": "ddp", "processes": 2, "offload": "cpu"}, r"launch.offload=cpu works with zero1, zero2 and zero3, not with ddp"),
        ({"config": "zero2", "processes": 2, "offload": "nvme", "nvme_path": "/x"}, r"offload=nvme works with zero3, not with zero2"),
    ],
)  # fmt: skip
def test_a_launch_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        command(LaunchConfig(**changes), [], "seed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "ddp", "machines": 2}, "machines=2 need main_address=HOST:PORT"),
        (
            {"config": "ddp", "machines": 2, "processes": 3, "main_address": "a:1"},
            "processes=3 is not a multiple of machines=2",
        ),
        (
            {"config": "ddp", "machines": 2, "processes": 2, "main_address": "a:1", "parallel_branches": 2},
            "parallel_branches=2 divides one machine",
        ),
        ({"machine_rank": 1}, "machine_rank=1 is not below machines=1"),
        ({"config": "zero3", "offload": "nvme"}, "offload=nvme and nvme_path=None: each needs the other"),
        ({"processes": 8}, "processes=8 has no effect without a group of processes; add launch=accelerate"),
        ({"offload": "cpu"}, "offload=cpu has no effect without a group"),
    ],
)
def test_a_contradiction_in_the_launch_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        LaunchConfig(**changes)


def test_the_command_of_a_group_on_several_machines():
    launch = LaunchConfig(
        config="zero3", processes=32, machines=4, machine_rank=2, main_address="first:29500", offload="cpu"
    )
    words = " ".join(command(launch, ["experiment=tiny"], "mix/bam"))
    for part in (
        "zero3_multinode.yaml", "--num_processes 32", "--num_machines 4", "--machine_rank 2", "--main_process_ip first",
        "--main_process_port 29500", "--offload_optimizer_device cpu --offload_param_device cpu",
        "-m launch.pipeline experiment=tiny stage=mix/bam",
    ):  # fmt: skip
        assert part in words


def test_the_environment_says_what_was_asked_for():
    assert asked_strategy({}) == "single" and asked_strategy({"LOCAL_RANK": "0"}) == "ddp"
    assert asked_strategy({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}) == "zero3"
    with pytest.raises(ValueError, match="zero_optimization.stage=0, expected 1, 2 or 3"):
        asked_strategy({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"})


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    train = TrainConfig(
        tokens=64, proportions={"code": 1.0}, sequence_length=16, batch_sequences=8, micro_batch_sequences=4, lr=1e-3
    )
    check_ranks(train, 2)
    with pytest.raises(
        ValueError, match=r"branches.code.train.batch_sequences=8 must be a multiple of ranks .* = 4 × 4"
    ):
        check_ranks(train, 4, "branches.code.train")
    check_ranks(replace(train, micro_batch_sequences=2), 4)


def test_branches_side_by_side_get_equal_shares_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [share["cores"] for share in shares(LaunchConfig(parallel_branches=2))] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"parallel_branches=9 exceeds the 8 cores of this machine; lower it to 8"):
        shares(LaunchConfig(parallel_branches=9))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    found = shares(LaunchConfig(config="ddp", parallel_branches=2))
    assert [share["gpus"] for share in found] == [["4", "5"], ["6", "7"]]
    assert [share["processes"] for share in found] == [2, 2] and processes_of(LaunchConfig(config="ddp")) == 4
    with pytest.raises(ValueError, match=r"processes=4 cannot be divided among launch.parallel_branches=3"):
        shares(LaunchConfig(config="ddp", parallel_branches=3))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == []


# Real groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "joined", "changes", "message"),
    [
        ("ddp", "join('zero2')", {}, "launch.config asks for zero2, but the launcher started ddp"),
        ("ddp", "join('ddp', 3)", {}, "launch.processes=3, but the launcher started 2"),
        ("zero2", "join()", {"ACCELERATE_USE_CPU": "true"}, "asked for zero2, but Accelerate gives MULTI_CPU"),
    ],
)
def test_a_group_that_is_not_what_was_asked_for_stops(tmp_path, config, joined, changes, message):
    script = tmp_path / "script.py"
    script.write_text(f"from upcycle.team import join\nprint({joined})\n")
    done = accelerate(config, str(script), cwd=tmp_path, DS_ACCELERATOR="cpu", **changes)
    assert done.returncode != 0 and message in done.stderr, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The small walk in one process, snapshots and all."""
    where = tmp_path_factory.mktemp("alone")
    upcycle(*WALK, cwd=where)
    return where


def without(alone: Path, where: Path, *stages: str) -> Path:
    """A copy of the store, less some stages and the evaluations and the report."""
    manifest = json.loads((alone / "runs" / "tiny" / "manifest.json").read_text())
    dropped = [name for stage, name in manifest.items() if stage in stages or stage.startswith(("eval/", "report"))]
    shutil.copytree(alone / "artifacts", where / "artifacts", ignore=shutil.ignore_patterns(*dropped))
    return where


def artifact(where: Path, stage: str) -> Path:
    return where / "artifacts" / json.loads((where / "runs" / "tiny" / "manifest.json").read_text())[stage]


@pytest.mark.slow
def test_the_driver_starts_a_group_for_every_stage_that_one_can_make(alone, tmp_path):
    """Training of the mixture under ZeRO-2, and all evaluations: the same figures as one process, to rounding."""
    without(alone, tmp_path, "mix/bam")
    done = upcycle(*WALK, *GROUP, "launch.config=zero2", cwd=tmp_path)
    assert "mix/bam                  made in" in done.stdout and "report:" in done.stdout
    ours, theirs = weights(tmp_path, "mix/bam"), weights(alone, "mix/bam")
    assert ours.keys() == theirs.keys()
    for name in ("eval/seed", "eval/code"):  # of models that are the very same
        a, b = (artifact(where, name) for where in (tmp_path, alone))
        assert (a / "evaluation.json").read_bytes() == (b / "evaluation.json").read_bytes()
        one, other = np.load(a / "documents.npz"), np.load(b / "documents.npz")
        assert all(np.array_equal(one[key], other[key]) for key in other.files)
    one, other = (json.loads((artifact(w, "eval/bam") / "evaluation.json").read_text()) for w in (tmp_path, alone))
    for domain, found in one["domains"].items():
        assert found["nats"] == pytest.approx(other["domains"][domain]["nats"], rel=2e-3)  # trained in bf16
    again = upcycle(*WALK, *GROUP, "launch.config=zero2", cwd=tmp_path)
    assert "made in" not in again.stdout


@pytest.mark.slow
def test_accelerate_launch_by_hand_from_any_directory(alone, tmp_path):
    without(alone, tmp_path, "mix/bam")
    done = accelerate("fsdp2", "-m", "launch.pipeline", *WALK, "stage=mix/bam", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mix/bam                  made in") == 1  # one voice
    assert weights(tmp_path, "mix/bam").keys() == weights(alone, "mix/bam").keys()
    curvature, theirs = (artifact(where, "curvature/fisher/code") for where in (tmp_path, alone))
    shutil.rmtree(curvature)
    measured = accelerate("ddp", "-m", "launch.pipeline", *WALK, "stage=curvature/fisher/code", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr[-3000:]
    assert (curvature / "curvature.json").read_bytes() == (theirs / "curvature.json").read_bytes()
    ours, other = (load_file(where / "curvature.safetensors") for where in (curvature, theirs))
    assert ours.keys() == other.keys()
    for name, expected in other.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-6 * float(expected.max()), msg=name)
    evaluated = accelerate("ddp", "-m", "launch.pipeline", *WALK, "stage=eval/seed", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    ours, theirs = (artifact(where, "eval/seed") / "evaluation.json" for where in (tmp_path, alone))
    assert ours.read_bytes() == theirs.read_bytes()  # routing is none of a dense model's; see below for a mixture's


@pytest.fixture(scope="module")
def evaluated(alone, tmp_path_factory) -> Path:
    """The mixture evaluated by one process with as many threads as a rank has: sums of fp32 depend on it."""
    where = without(alone, tmp_path_factory.mktemp("evaluated"))
    upcycle(*WALK, "stage=eval/bam", "launch.threads=1", cwd=where)
    return where


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero3"])
def test_a_mixture_is_evaluated_to_the_byte_on_two_ranks(alone, evaluated, tmp_path, config):
    """Also where each rank holds a part of the weights."""
    without(alone, tmp_path)
    done = accelerate(config, "-m", "launch.pipeline", *WALK, "stage=eval/bam", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (artifact(where, "eval/bam") for where in (tmp_path, evaluated))
    assert (ours / "evaluation.json").read_bytes() == (theirs / "evaluation.json").read_bytes()
    one, other = np.load(ours / "documents.npz"), np.load(theirs / "documents.npz")
    assert all(np.array_equal(one[key], other[key]) for key in other.files)


@pytest.mark.slow
def test_an_ensemble_and_a_greedy_soup_are_the_same_to_the_byte_on_two_ranks(alone, tmp_path):
    """Also where each rank holds a part of the weights."""
    found = []
    for number, config in enumerate((None, "ddp", "fsdp2")):
        where, made = without(alone, tmp_path / str(number)), []
        for stage in ("eval/btm", "greedy_soup"):
            words = [*WALK, "btm={}", "greedy_soup=true", f"stage={stage}"]
            if config is None:
                upcycle(*words, "launch.threads=1", cwd=where)
            else:
                done = accelerate(config, "-m", "launch.pipeline", *words, cwd=where)
                assert done.returncode == 0, done.stderr[-3000:]
            made += where.glob(f"artifacts/{stage.replace('/', '-')}-*")
        ensemble, soup = made
        documents = dict(np.load(ensemble / "documents.npz"))
        files = [ensemble / "evaluation.json", soup / "soup.json", soup / "model.safetensors"]
        found.append(([path.read_bytes() for path in files], documents))
    for whole, documents in found[1:]:
        assert whole == found[0][0]
        assert all(np.array_equal(documents[key], found[0][1][key]) for key in documents)


@pytest.mark.slow
def test_a_plan_in_a_group_is_told_once(tmp_path):
    done = accelerate("ddp", "-m", "launch.pipeline", *WALK, "plan=true", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("stages done") == 1, done.stderr[-2000:]


@pytest.mark.slow
def test_a_sweep_in_a_group(alone, tmp_path):
    without(alone, tmp_path, "mix/bam")
    done = accelerate("ddp", "-m", "launch.pipeline", *WALK, "-m", "mix.lr=1e-3,2e-3", "stage=mix/bam", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mix/bam                  made in") == 2
    assert len(list(tmp_path.glob("artifacts/mix-bam-*"))) == 2


@pytest.mark.slow
def test_one_group_can_make_every_stage(alone, tmp_path):
    """Without `stage=`: the first process makes what needs no group, the others wait for it."""
    without(alone, tmp_path, "assemble/bam", "mix/bam")
    done = accelerate("ddp", "-m", "launch.pipeline", *WALK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "assemble/bam             made in" in done.stdout and "report:" in done.stdout
    assert (artifact(tmp_path, "report") / "report.html").is_file()


def ranks_below(driver: subprocess.Popen) -> dict[str, psutil.Process]:
    """The processes of the driver's group by their rank."""
    found = {}
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            rank = process.environ().get("RANK")
            if rank is not None and "launch.pipeline" in process.cmdline():
                found[rank] = process
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_a_killed_rank_ends_the_group_and_the_next_start_goes_on(alone, tmp_path, config):
    settings = [
        *WALK,
        "mix.tokens=200000",
        *GROUP,
        f"launch.config={config}",
        "stage=mix/bam",
        "launch.checkpoint_steps=5",
    ]
    where, undisturbed = without(alone, tmp_path / "killed", "mix/bam"), tmp_path / "undisturbed"
    driver = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *settings],
        cwd=where, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(where.glob("artifacts/mix-bam-*.partial/checkpoints/step-0000001?")):
        assert driver.poll() is None and time.monotonic() < deadline, driver.stdout and driver.stdout.read()
        time.sleep(0.02)
    ranks_below(driver)["1"].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    output, _ = driver.communicate(timeout=60)
    assert time.monotonic() - killed_at < 60 and driver.returncode == 2
    assert "upcycle: rank 1 was killed by SIGKILL; the other processes of its group were stopped" in output
    assert re.search(r"stage mix/bam: its 2 processes ended .* it is partial at step \d+", output)
    resumed = upcycle(*settings, cwd=where)
    assert re.search(r"going on from step 1\d of", resumed.stdout)
    shutil.copytree(where / "artifacts", undisturbed / "artifacts", ignore=shutil.ignore_patterns("mix-bam-*"))
    upcycle(*settings, cwd=undisturbed)
    ours, theirs = (artifact(there, "mix/bam") / "model.safetensors" for there in (where, undisturbed))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_the_same_command_on_two_machines(alone, tmp_path):
    """Two drivers here as those of two machines with a common file system."""
    without(alone, tmp_path, "assemble/bam", "mix/bam", "branch/code")
    settings = [
        *WALK, *GROUP, "launch.config=zero2", "launch.machines=2", f"launch.main_address=127.0.0.1:{free_port()}", "~domains.cpp", "~branches.law", "~branches.math",
        "~domains.programs",
    ]  # fmt: skip
    drivers = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *settings, f"launch.machine_rank={rank}"],
            cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [driver.communicate(timeout=280)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    assert "mix/bam                  made in" in outputs[0] and "mix/bam " not in outputs[1]
    ours, theirs = weights(tmp_path, "branch/code"), weights(alone, "branch/code")
    assert all(abs(ours[key] - tensor).max() < 1e-3 for key, tensor in theirs.items())


@pytest.mark.slow
def test_branches_side_by_side_and_one_that_fails(alone, tmp_path):
    without(alone, tmp_path, "branch/code", "branch/law", "branch/math", "assemble/bam", "mix/bam")
    settings = [*WALK, "launch.parallel_branches=2"]
    done = upcycle(*settings, "+branches.law.train.lr=1e30", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert re.search(r"branch/law +FAILED: step \d+, rank 0: .*nothing was updated", done.stdout)
    assert "1 of 3 branches failed, the others are done" in done.stderr and "branch-law.log" in done.stderr
    for name in ("branch/code", "branch/math"):
        assert (
            artifact(tmp_path, name).is_dir()
            and f"{name}" in (tmp_path / "runs" / "tiny" / "logs" / f"{name.replace('/', '-')}.log").read_text()
        )
    upcycle(*settings, cwd=tmp_path)
    for name in ("branch/code", "branch/law", "branch/math"):
        ours, theirs = weights(tmp_path, name), weights(alone, name)
        for key, tensor in theirs.items():
            assert abs(ours[key] - tensor).max() < 1e-3, key  # threads differ
