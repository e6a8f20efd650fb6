"""One of two processes that load mixtures in parallel layouts; `test_parallel_plans.py` starts both and compares.

    RANK=0 python tests/ranks_plans.py DIRECTORY

DIRECTORY/cases.json: [[name, model directory, layout], ...]. Rank 0 writes DIRECTORY/<name>.pt for each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import upcycle.modeling  # noqa: F401  registers the classes

LAYOUTS: dict[str, dict] = {
    "tp": {"tp_size": 2},
    "fsdp": {"fsdp_size": 2},
    "fsdp_ep": {"fsdp_size": 2, "ep_size": 2},
    "tp_ep": {"tp_size": 2, "ep_size": 2},
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, in their order."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def run(directory: Path, layout: str, ids: Tensor) -> dict:
    """Logits, loss and gradients of the whole batch, and the shape of what this rank holds of each cut parameter.

    Ranks that share data (tensor parallelism) see all rows, others their own.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(**LAYOUTS[layout]))
    model.train()
    shared = layout.startswith("tp")
    mine = ids if shared else ids.chunk(dist.get_world_size())[dist.get_rank()]
    out = model(mine, labels=mine)
    out.loss.backward()
    gradients = {n: torch.zeros(p.shape) if p.grad is None else whole(p.grad) for n, p in model.named_parameters()}
    loss = out.loss.detach().clone()
    if not shared:
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    cut = {
        name: (tuple(p.to_local().shape), tuple(p.shape))
        for name, p in model.named_parameters()
        if isinstance(p, DTensor) and p.to_local().shape != p.shape
    }
    with torch.no_grad():
        evaluated = model.eval()(mine).logits
    return {
        "logits": out.logits.detach() if shared else gathered(out.logits.detach()),
        "evaluated": evaluated if shared else gathered(evaluated),
        "loss": loss,
        "gradients": gradients,
        "cut": cut,
    }


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
    ids = torch.load(directory / "ids.pt")
    for name, model, layout in json.loads((directory / "cases.json").read_text()):
        try:
            result = run(directory / model, layout, ids)
        except Exception as error:
            import traceback

            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        if dist.get_rank() == 0:
            torch.save(result, directory / f"{name}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
