"""The processes that make one stage together: who this one is, and that it is what was asked for.

A launcher (`accelerate launch`, torchrun) starts the processes and says in their environment how they are to work
together. Accelerate falls back to less without a word where something does not fit (no GPU, `--cpu`, FSDP of version 1),
and then every rank trains alone; so `join` compares what it got with what was asked for, and stops.

Strategies: single; ddp, every rank holds everything; zero1, zero2, zero3, DeepSpeed's partitions of optimizer state, and
gradients, and weights (arXiv:1910.02054); fsdp2, PyTorch's fully sharded parameters.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
PARTITIONED = ("zero3", "fsdp2")  # a rank holds part of the weights
PATIENCE = timedelta(days=7)  # how long ranks wait for the first one, which makes the stages that need no group


@dataclass(frozen=True)
class Team:
    """This process among `size`: `rank`, the `strategy` they train by, and the group that their words go through."""

    rank: int = 0
    size: int = 1
    strategy: str = "single"
    accelerator: Any = field(default=None, repr=False, compare=False)
    group: Any = field(default=None, repr=False, compare=False)

    @property
    def device(self) -> Any:
        """Where this process computes."""
        import torch

        if self.accelerator is not None:
            return self.accelerator.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The first rank's `value`, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def any(self, value: bool) -> bool:
        """Whether some rank's `value` is true, on every rank."""
        if self.size == 1:
            return value
        import torch

        count = torch.tensor([int(value)])
        self.add(count)
        return bool(count.item())

    def add(self, tensor: Any) -> None:
        """Put into every rank's `tensor`, on the CPU, the sum of all of them."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, group=self.group)

    def wait(self) -> None:
        """Until every rank is here."""
        self.gather(None)


ALONE = Team()


def leave() -> None:
    """Take this process's group apart, if it has one, when every rank is done: threads that outlive Python abort it."""
    if not in_group():
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def asked_strategy(environment: Mapping[str, str]) -> str:
    """The strategy that a launcher's environment asks for.

    Raises ValueError: FSDP of version 1, Megatron-LM, a DeepSpeed configuration without a ZeRO stage.
    """

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() in ("true", "1", "yes")

    if on("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("Megatron-LM is not supported, expected one of " + ", ".join(STRATEGIES))
    if on("ACCELERATE_USE_DEEPSPEED"):
        return f"zero{_zero_stage(environment)}"
    if on("ACCELERATE_USE_FSDP"):
        version = environment.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(
                f"FSDP of version {version}: expected version 2; set fsdp_config.fsdp_version: 2 in the launch file"
            )
        return "fsdp2"
    return "ddp" if "LOCAL_RANK" in environment or int(environment.get("WORLD_SIZE", 1)) > 1 else "single"


def _zero_stage(environment: Mapping[str, str]) -> int:
    import json
    from pathlib import Path

    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file and file != "none":
        stage = json.loads(Path(file).read_text()).get("zero_optimization", {}).get("stage", 0)
    else:
        stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    if stage not in (1, 2, 3):
        raise ValueError(
            f"DeepSpeed's zero_optimization.stage={stage}, expected 1, 2 or 3; without ZeRO, launch with ddp instead"
        )
    return stage


def in_group(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of a group."""
    return asked_strategy(environment) != "single"


def join(strategy: str | None = None, processes: int | None = None) -> Team:
    """Become one of the group that the launcher started.

    strategy, processes: what the settings ask for, where they say so; the launcher's environment is always held against
    what came out. Raises ValueError: this is not the group that was asked for.
    """
    asked = asked_strategy(os.environ)
    if strategy not in (None, asked):
        raise ValueError(
            f"launch.config asks for {strategy}, but the launcher started {asked}; give accelerate launch the file of that "
            "strategy, or correct launch.config"
        )
    if asked == "single":
        _check_size(processes, 1)
        return ALONE
    accelerator = _accelerator(asked)
    _check_type(asked, accelerator)
    if asked.startswith("zero"):
        _check_precision(accelerator.deepspeed_plugin.deepspeed_config)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != size:
        raise ValueError(
            f"the launcher started {size} processes, but Accelerate formed a group of {accelerator.num_processes}: every "
            "process would train alone; launch without --cpu and with one of this package's launch files"
        )
    _check_size(processes, size)
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    return Team(accelerator.process_index, size, asked, accelerator, group)


def _accelerator(asked: str) -> Any:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    on_cpu = not torch.cuda.is_available()
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if on_cpu:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    if asked.startswith("zero"):
        # Not cpu=True, which turns DeepSpeed off without a word.
        accelerator: Any = Accelerator(kwargs_handlers=handlers, mixed_precision="no")
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else every model built here would be partitioned (zero.partitioned_loading)
        return accelerator
    # Sharding is ours (sharded.py), on the parameters of the whole objective: Accelerate's would be a second one, and does
    # not exist without a GPU. Its part here is the process group.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    return Accelerator(cpu=on_cpu, kwargs_handlers=handlers, mixed_precision="no")


def _check_precision(deepspeed_config: Mapping[str, Any]) -> None:
    for name in ("bf16", "fp16"):
        if deepspeed_config.get(name, {}).get("enabled") in (True, "true"):
            raise ValueError(
                f"DeepSpeed's {name}.enabled=true would turn all weights, the routers' too, into {name}; leave it out: "
                "train.precision=bf16 computes in bf16 with fp32 weights"
            )


def _check_type(asked: str, accelerator: Any) -> None:
    from accelerate.utils import DistributedType

    expected = (
        {DistributedType.DEEPSPEED}
        if asked.startswith("zero")
        else {DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}
    )
    if accelerator.distributed_type not in expected:
        raise ValueError(
            f"the launcher asked for {asked}, but Accelerate gives {accelerator.distributed_type.value}: gradients would not "
            "be exchanged as asked. accelerate launch --cpu turns DeepSpeed and FSDP off; leave it out (without a GPU the "
            "processes use the CPU by themselves)"
        )


def _check_size(asked: int | None, size: int) -> None:
    if asked not in (None, size):
        raise ValueError(
            f"launch.processes={asked}, but the launcher started {size}; make accelerate launch --num_processes the same"
        )
