"""How much memory a few steps of training really take, beside what `plan=true launch.gpu=cpu` says of them.

    python -m launch.peak_memory DIR --strategy zero2 --processes 2

trains the checkpoint in DIR on random tokens, through the training loop and the launcher that every run has, and prints JSON: planned and
measured bytes of the rank that took most, above what its imports took. Linux only (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 2  # moments are there from the second one on
MEMBER = "UPCYCLE_PEAK_MEMORY_MEMBER"


def resident(what: str) -> int:
    """Bytes that /proc/self/status gives as `what`: VmRSS, or VmHWM since it was last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def train_config(options: argparse.Namespace) -> Any:
    from upcycle.config import ScheduleConfig, TrainConfig

    batch = options.sequences * options.processes * options.accumulation
    return TrainConfig(
        tokens=STEPS * batch * options.length, proportions={"random": 1.0}, sequence_length=options.length,
        batch_sequences=batch, micro_batch_sequences=options.sequences, lr=1e-5, precision=options.precision,
        gradient_checkpointing=options.checkpointing, schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        max_epochs=float("inf"),
    )  # fmt: skip


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """In a process of the group: train, and see what was resident at most. Every rank's bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    import upcycle.modeling  # noqa: F401  (registers the mixture's classes)
    from evals.throughput import random_domain
    from upcycle.machine import keep_freed_memory
    from upcycle.store import Run
    from upcycle.team import join
    from upcycle.train import train
    from upcycle.zero import partitioned_loading

    keep_freed_memory()  # as every run on CPUs does
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.processes))
    team = join()
    from transformers.models.llama import modeling_llama  # noqa: F401  (imports are not what is measured)

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with partitioned_loading(team):
        model = AutoModelForCausalLM.from_pretrained(options.directory, dtype=torch.float32)
    config = train_config(options)
    with tempfile.TemporaryDirectory() as folder:
        data = {"random": random_domain(Path(folder) / "random", model.config.vocab_size, config)}
        run = Run(say=lambda text: None, checkpoint_seconds=None, team=team)
        out = Path(team.share(folder))
        engine = train(model, config, data, out, run, 1.0)
        peaks = team.gather(resident("VmHWM") - before)
        engine.close()
        team.wait()
    return {"peaks": peaks, "leads": team.leads}


def own_command(options: argparse.Namespace) -> list[str]:
    """This program again, as the process or group that trains."""
    if options.strategy == "single":
        return [sys.executable, "-m", "launch.peak_memory", *sys.argv[1:]]
    from launch.config import LaunchConfig
    from launch.groups import command

    whole = command(LaunchConfig(config=options.strategy, processes=options.processes), [], "")
    return [*whole[: whole.index("launch.pipeline")], "launch.peak_memory", *sys.argv[1:]]


def planned(options: argparse.Namespace) -> Any:
    """The plan's bytes of the same steps."""
    from transformers import AutoConfig

    import upcycle.modeling  # noqa: F401  (registers the mixture's config)
    from launch.hardware import CPU, device
    from launch.planner import Group, needs
    from upcycle.cost import Shape
    from upcycle.footprint import footprint

    config, train = AutoConfig.from_pretrained(options.directory), train_config(options)
    found = footprint(config, train, options.strategy, cpu=True)
    group = Group(options.strategy, options.processes, device(CPU, options.processes), link=1.0, utilisation=1.0)
    return needs(Shape.of_config(config.to_dict()), found, train, group)


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured, for docs/planning.md."""
    lines = [
        "| parameters | strategy | tokens of a micro-batch | checkpointing | planned | measured | off |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ranks = f", {row['processes']} processes" if row["processes"] > 1 else ""
        tokens = f"{row['sequences']} × {row['length']}" + (
            f", {row['accumulation']} a step" if row["accumulation"] > 1 else ""
        )
        lines.append(
            f"| {row['parameters'] / 1e6:.1f}M | {row['strategy']}{ranks} | {tokens} | {'yes' if row['checkpointing'] else 'no'} | "
            f"{row['planned'] / 1e9:.2f} GB | {row['measured'] / 1e9:.2f} GB | {row['planned'] / row['measured'] - 1:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a checkpoint")
    parser.add_argument("--strategy", default="single", help="single, or a file of launch/accelerate")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a rank's step")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    if os.environ.get(MEMBER) == "1":
        found = measured(options)
        if found["leads"]:
            print(json.dumps({"peaks": found["peaks"]}), flush=True)
        return
    done = subprocess.run(
        own_command(options), env=os.environ | {MEMBER: "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"peaks"')]
    plan = planned(options)
    facts = {name: value for name, value in vars(options).items() if name != "directory"}
    row = facts | {"parameters": plan.parameters, "planned": plan.peak, "measured": max(json.loads(line)["peaks"])}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
