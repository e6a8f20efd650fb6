"""Training jobs for a group of processes: `accelerate launch --config_file ... tests/ranks.py JOBS.json`.

A job trains a model directory and leaves a run's files and `facts.json`, what the engine was. The same function runs a job
in one process, for comparison.
"""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import transformers
from pydantic import TypeAdapter

import upcycle.modeling  # noqa: F401  (registers the mixture's classes)
from upcycle.config import TrainConfig
from upcycle.engine import PlainEngine
from upcycle.store import Run
from upcycle.team import ALONE, Team, join, leave
from upcycle.train import train, write_trained
from upcycle.zero import partitioned_loading


class Killed(BaseException):
    pass


def run_job(job: dict, team: Team = ALONE) -> None:
    """job: `model`, `data`, `out`, `train` (TrainConfig), and optionally `checkpoint_steps`; `stop`, the step after which
    the process gives up, as if it were killed; `unsynchronised`, for gradients that are not exchanged."""
    out = Path(job["out"])
    if team.leads:
        out.mkdir(parents=True, exist_ok=True)
    team.wait()
    with partitioned_loading(team):
        model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    said: list[str] = []
    if team.strategy == "zero3":  # small tensors are kept whole by default, and all of ours are small
        kept_below = job.get("persistence_threshold", 0)
        zero = team.accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = kept_below

    def advance(done: int, total: int, **_figures) -> None:
        if done == job.get("stop"):
            raise Killed
        if {"rank": team.rank, "step": done} == job.get("fails"):
            raise ValueError(f"rank {team.rank} fails here")

    run = Run(said.append, advance, checkpoint_seconds=None, checkpoint_steps=job.get("checkpoint_steps"), team=team)
    config = TypeAdapter(TrainConfig).validate_python(job["train"])
    data = {name: Path(path) for name, path in job["data"].items()}
    try:
        with unsynchronised(team) if job.get("unsynchronised") else nullcontext():
            engine = train(model, config, data, out, run, train_flops_per_token=1.0)
    except Killed:
        team.wait()
        return
    facts = {
        "engine": type(engine.module if team.strategy in ("single", "ddp", "fsdp2") else engine.engine).__name__,
        "zero_stage": engine.engine.zero_optimization_stage() if team.strategy.startswith("zero") else None,
        "optimizer_bytes": team.gather(engine.optimizer_bytes()),
        "said": said,
    }
    write_trained(engine, out)
    engine.close()
    if team.leads:
        (out / "facts.json").write_text(json.dumps(facts))
    team.wait()


def unsynchronised(team: Team):
    """Every rank keeps the gradients of its own share."""
    if team.strategy == "ddp":
        return mock.patch.object(PlainEngine, "micro_batch", lambda engine, last: engine.module.no_sync())
    if team.strategy == "fsdp2":
        import upcycle.sharded as sharded

        inner = sharded.ShardedEngine._prepare

        def prepare(engine):
            inner(engine)
            engine.module.set_requires_gradient_sync(False)

        return mock.patch.object(sharded.ShardedEngine, "_prepare", prepare)
    # DeepSpeed's exchanges all go through this module.
    import deepspeed.comm as comm

    def nothing(*arguments, **named):
        return None

    def own_share(output, tensor, *arguments, **named):
        output.copy_(tensor.chunk(team.size)[team.rank])

    return mock.patch.multiple(comm, all_reduce=nothing, reduce=nothing, reduce_scatter_fn=own_share)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    team = join()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        done = team.gather((Path(job["out"]) / "facts.json").exists())
        if not any(done):  # else by processes before these
            run_job(job, team)
    leave()


if __name__ == "__main__":
    main()
