"""One of two processes that load mixtures in parallel layouts; `test_parallel_plans.py` starts both and compares.

    RANK=0 python tests/ranks_plans.py DIRECTORY

DIRECTORY holds ids.pt and cases.json: a list of {name, model, layout} and, optionally, `config` (more of a
DistributedConfig), `checkpointing`, `accumulate`, `save`, `light` (nothing is generated), `fault` (a name in FAULTS).
Rank 0 writes DIRECTORY/<name>.pt for each.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from upcycle import kernels, modeling

LAYOUTS: dict[str, dict] = {
    "tp": {"tp_size": 2},
    "fsdp": {"fsdp_size": 2},
    "fsdp_ep": {"fsdp_size": 2, "ep_size": 2},
    "tp_ep": {"tp_size": 2, "ep_size": 2},
}
# Mistakes that the comparison has to notice.
FAULTS = {
    # What the other rank's heads say about the gates is not added.
    "own_heads_only": lambda: mock.patch("torch.distributed.tensor.Partial", Replicate),
    # Each rank adds the whole last bias of an expert, and the sum over ranks has it twice.
    "bias_twice": lambda: mock.patch.object(
        kernels._SeenExperts, "__getattr__", lambda self, name: getattr(self._experts, name)
    ),
    # Each rank's experts saw the tokens of both ranks; their gradients are not divided by two.
    "undivided_experts": nullcontext,
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(rows: Tensor, shared: bool) -> Tensor:
    """The rows of all ranks, in their order; `shared` rows are the same on all."""
    if shared:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def run(case: dict, directory: Path, ids: Tensor) -> dict:
    """Loss, logits, gradients and greedy continuations of the whole batch, and what this rank holds of cut parameters.

    Ranks share all rows under tensor parallelism; else each has its own.
    """
    config = DistributedConfig(**LAYOUTS[case["layout"]], **case.get("config", {}))
    model = AutoModelForCausalLM.from_pretrained(directory / case["model"], distributed_config=config).train()
    if case.get("checkpointing"):
        model.activation_checkpointing_enable()
    if case.get("fault") == "undivided_experts":
        for module in model.modules():
            if isinstance(module, modeling.StackedExperts):
                module.set_gradient_divide_factor(1.0)
    shared = config.tp_size == 2
    mine = ids if shared else ids.chunk(2)[dist.get_rank()]
    parts, outs = mine.chunk(case.get("accumulate", 1)), []
    for part in parts:
        outs.append(model(part, labels=part))
        (outs[-1].loss / len(parts)).backward()
    # Before another forward: what FSDP keeps gathered then has no gradients.
    gradients = {n: torch.zeros(p.shape) if p.grad is None else whole(p.grad) for n, p in model.named_parameters()}
    cut = {
        n: (tuple(p.to_local().shape), tuple(p.shape)) for n, p in model.named_parameters() if isinstance(p, DTensor)
    }
    loss = torch.stack([out.loss.detach() for out in outs]).mean()
    dist.all_reduce(loss)
    model.eval()
    with torch.no_grad():
        logits = model(mine).logits
    result = {
        "loss": loss / 2,
        "training_logits": gathered(torch.cat([out.logits.detach() for out in outs]), shared),
        "logits": gathered(logits, shared),
        "gradients": gradients,
        "cut": {name: shapes for name, shapes in cut.items() if shapes[0] != shapes[1]},
    }
    if shared and not case.get("light"):
        result["tokens"] = model.generate(mine, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    if case.get("save"):
        model.save_pretrained(directory / f"{case['name']}-saved")
    return result


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=dist.FileStore(str(directory / "store"), 2), rank=rank, world_size=2)
    ids = torch.load(directory / "ids.pt")
    for case in json.loads((directory / "cases.json").read_text()):
        with FAULTS.get(case.get("fault"), nullcontext)():
            result = run(case, directory, ids)
        if rank == 0:
            torch.save(result, directory / f"{case['name']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
