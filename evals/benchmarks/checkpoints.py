"""Four checkpoints of one seed, to assemble and to merge; and what two programs made of them, compared. Runs in a side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.benchmarks.models import BRANCHES, built

MODELS = ("seed", *BRANCHES)
MOVED = 0.05  # how far a branch lies from the seed, as a share of a weight's own size


def write_models(config: Mapping[str, Any]) -> dict[str, Any]:
    """A seed and three branches that lie beside it, in bf16 with a tokenizer, below `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({word: number for number, word in enumerate(["<s>", *words])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    model = built(config)
    seed = {name: weight.clone() for name, weight in model.named_parameters()}
    for number, name in enumerate(MODELS):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator) * seed[key].std().nan_to_num(0.0)
                weight.copy_(seed[key] + (MOVED * noise if number else 0.0))
        folder = Path(config["folder"]) / name
        model.to(torch.bfloat16).save_pretrained(folder)
        model.float()
        tokenizer.save_pretrained(folder)
    return {"bytes": sum(path.stat().st_size for path in Path(config["folder"]).rglob("*.safetensors"))}


def same_mixture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Whether mergekit-moe's Mixtral (`peer`) has the tensors of our mixture (`ours`), routers left out: both draw theirs.

    `problem` is empty if so.
    """
    from upcycle.checkpoint import Checkpoint
    from upcycle.configuration import UpcycledConfig
    from upcycle.native import native_tensors

    checkpoint = Checkpoint(config["ours"])
    mixture: Any = UpcycledConfig.from_pretrained(config["ours"])
    ours = dict(_stacked(native_tensors(checkpoint, mixture, "mixtral")))
    peer = Checkpoint(config["peer"])
    theirs = dict(_stacked((name, peer.get(name)) for name in peer.names))
    return {"problem": _difference(ours, theirs, rounding=0.0), "tensors": len(ours)}


def same_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of two dense models, within the rounding of bf16."""
    from upcycle.checkpoint import Checkpoint

    ours, theirs = Checkpoint(config["ours"]), Checkpoint(config["peer"])
    pairs = [{name: one.get(name) for name in one.names} for one in (ours, theirs)]
    return {"problem": _difference(pairs[0], pairs[1], rounding=2**-7), "tensors": len(pairs[0])}


def _stacked(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Mixtral's tensors under one name each, whether experts lie side by side or one by one; without routers."""
    for name, tensor in tensors:
        if name.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight", "lm_head.weight")):
            continue
        name = name.replace("block_sparse_moe", "mlp")
        if name.endswith("experts.gate_up_proj"):
            for expert, rows in enumerate(tensor):
                for part, half in zip(("w1", "w3"), rows.chunk(2), strict=True):
                    yield name.replace("gate_up_proj", f"{expert}.{part}.weight"), half
        elif name.endswith("experts.down_proj"):
            for expert, rows in enumerate(tensor):
                yield name.replace("down_proj", f"{expert}.w2.weight"), rows
        else:
            yield name, tensor


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], rounding: float) -> str:
    """Raises nothing: what differs, in words; "" for nothing. rounding: share of a tensor's largest value."""
    if odd := sorted(set(ours) ^ set(theirs)):
        return f"{len(odd)} tensors are in one of the two only, {odd[0]} for example"
    for name, one in ours.items():
        off = (one.float() - theirs[name].float()).abs().max().item()
        if not off <= rounding * one.float().abs().max().item():
            return f"{name} differs by {off:.2e}, of at most {one.float().abs().max().item():.2e}"
    return ""


class InProcess:
    """Assembling or merging without the start of Python, in bytes read and written a second.

    config: `models`, `out`, `how`, and `experts` where there are not to be four: branches are used again under other names.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config, self.number = config, 0
        self.about: dict[str, Any] = {}
        self.seed = Path(config["models"]) / "seed"
        names = [
            f"{BRANCHES[number % 3]}{number // 3 or ''}" for number in range(config.get("experts", len(MODELS)) - 1)
        ]
        self.branches = {name: Path(config["models"]) / name.rstrip("0123456789") for name in names}

    def measure(self) -> dict[str, Any]:
        import os
        import shutil
        import time

        out = Path(self.config["out"])
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()  # what others wrote is not ours to wait for
        start = time.perf_counter()
        HOW[self.config["how"]](self.seed, self.branches, out)
        seconds = time.perf_counter() - start
        read = sum(_weights(folder) for folder in (self.seed, *self.branches.values()))
        return {"rate": (read + _weights(out)) / seconds, "seconds": seconds}


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _assemble(seed: Path, branches: dict[str, Path], out: Path) -> None:
    from upcycle.api import preset
    from upcycle.assembly import write_mixture

    write_mixture(seed, branches, out, preset("btx"))


def _ties(seed: Path, branches: dict[str, Path], out: Path) -> None:
    from upcycle.dense_merge import write_merged
    from upcycle.merge_config import MergeConfig

    write_merged(seed, branches, out, MergeConfig(method="ties", options={"density": 0.5}), report=False)


HOW = {"assemble": _assemble, "ties": _ties}
