"""`python -m evals.camex_costs`: parameters, FLOPs, bytes kept for backward and seconds of a training step, CAMEx beside other mixtures.

All of the same experts: a seed and three branches of random weights, as wide as asked for. FLOPs are counted as they are computed
(torch's FlopCounterMode) beside what cost.py plans; bytes are those of the tensors that autograd keeps, each storage once, weights
not among them; seconds are the median of repeats in one process. `--json=FILE` writes the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from upcycle.api import preset
from upcycle.assembly import placed_experts, upcycled_config
from upcycle.cost import Shape
from upcycle.machine import describe, keep_freed_memory
from upcycle.modeling import UpcycledForCausalLM

BRANCHES = ("code", "law", "math")
OTHERS = ("btx_top1", "btx", "btx_soft", "btx_uniform")
SEGMENTS = (64, 256, 1024)


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """(what it is called, the fields of its AssembleConfig)."""
    for name in OTHERS:
        yield name, {"method": name}
    for tokens in SEGMENTS:
        pool = {"router": {"pool": {"tokens": tokens}}}
        yield f"camex_domain, segments of {tokens}", {"method": "camex_domain", **pool}
        yield f"camex_layer, segments of {tokens}", {"method": "camex_layer", **pool}
    yield "camex_layer, rank 8", {"method": "camex_layer", "combine": {"rank": 8}}
    yield "camex_layer, one M for all layers", {"method": "camex_layer", "combine": {"share": "all"}}
    for name in ("camex_ties", "camex_dynamic", "camex_linear"):
        yield name, {"method": name}
    yield "camex_dynamic, previous_merged", {"method": "camex_dynamic", "combine": {"update": "previous_merged"}}


def measured(config: Any, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """One mixture's row."""
    torch.manual_seed(0)
    model = UpcycledForCausalLM._from_config(config).train()
    ids = torch.randint(0, config.vocab_size, (batch, length))
    shape = Shape.of_config(config.to_dict())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    planned = shape.forward_flops_per_token(length) + shape.fixed_flops / ids.numel()
    return {
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "counted_flops_per_token": counter.get_total_flops() / ids.numel(),
        "planned_flops_per_token": planned,
        "kept_bytes": kept_bytes(model, ids),
        "seconds": statistics.median(seconds[1:]),
        "spread": max(seconds[1:]) - min(seconds[1:]),
    }


def kept_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Of all tensors that a forward keeps for its backward, but parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    assert loss.requires_grad
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("hidden", 256), ("ffn", 704), ("layers", 4), ("batch", 2), ("length", 2048), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    keep_freed_memory()
    seed = LlamaConfig(
        hidden_size=asked.hidden, intermediate_size=asked.ffn, num_hidden_layers=asked.layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=2048, max_position_embeddings=asked.length, tie_word_embeddings=True,
    )  # fmt: skip
    rows = {}
    for name, fields in variants():
        choice = preset(**fields)
        config = upcycled_config(seed, placed_experts(seed, list(BRANCHES), choice), choice)
        rows[name] = measured(config, asked.batch, asked.length, asked.repeats)
    _print(rows, asked)
    if asked.json:
        asked.json.write_text(
            json.dumps({"machine": describe(), "settings": vars(asked) | {"json": None}, "rows": rows}, indent=1)
        )


def _print(rows: dict[str, dict[str, Any]], asked: argparse.Namespace) -> None:
    table = Table(
        title=f"{asked.batch} × {asked.length} tokens, {asked.layers} layers, hidden {asked.hidden}, feed-forward {asked.ffn}"
    )
    titles = (
        "mixture",
        "parameters",
        "active",
        "MFLOPs a token, forward",
        "as planned",
        "MB kept",
        "s a step",
        "spread",
    )
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['parameters'] / 1e6:.2f}M", f"{row['active_parameters'] / 1e6:.2f}M",
            f"{row['counted_flops_per_token'] / 1e6:.2f}", f"{row['planned_flops_per_token'] / 1e6:.2f}",
            f"{row['kept_bytes'] / 1e6:.0f}", f"{row['seconds']:.2f}", f"{row['spread']:.2f}",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
