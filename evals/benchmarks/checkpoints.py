"""Four checkpoints of one seed, to assemble and to merge; and what two programs made of them, compared. Runs in a side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.benchmarks.models import BRANCHES, built

MODELS = ("seed", *BRANCHES)
# What is timed: branches whose every weight moved, by some share of itself.
ORDINARY = 0.05
# What is compared: half of a branch's weights differ from the seed's, by so much of themselves, up or down. So TIES with density 0.5 trims what is 0,
# and no two branches cancel: what it must make hangs on no rounding and no order of equals, which programs settle differently.
MOVED = {"code": (0.0625, 0.1), "law": (0.2, 0.25), "math": (0.5, 0.6)}
ROUNDING = 2**-5  # of a weight: TIES in bf16 adds up to four roundings; another sign elected is a tenth of it and more


def write_models(config: Mapping[str, Any]) -> dict[str, Any]:
    """A seed and three branches that lie beside it, in bf16 with a tokenizer, below `folder`. config: `exact`, those to compare."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({word: number for number, word in enumerate(["<s>", *words])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    model = built(config).to(torch.bfloat16)
    seed = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for name in MODELS:
        generator = torch.Generator().manual_seed(MODELS.index(name))
        if name in MOVED:
            with torch.no_grad():
                for key, weight in model.named_parameters():
                    if config.get("exact"):
                        moves = _moves(weight.shape, *MOVED[name], generator)
                    else:
                        moves = ORDINARY * torch.randn(weight.shape, generator=generator)
                    weight.copy_(seed[key] * (1 + moves))
        folder = Path(config["folder"]) / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"bytes": sum(path.stat().st_size for path in Path(config["folder"]).rglob("*.safetensors"))}


def _moves(shape: torch.Size, least: float, most: float, generator: torch.Generator) -> Tensor:
    """0 for every other weight, else ± between the two."""
    moves = torch.empty(shape).uniform_(least, most, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    moves.mul_(signs).view(-1)[::2] = 0.0
    return moves


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
    return {"problem": _difference(ours, theirs), "tensors": len(ours)}


def same_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of two dense models, within the rounding of bf16."""
    from upcycle.checkpoint import Checkpoint

    ours, theirs = Checkpoint(config["ours"]), Checkpoint(config["peer"])
    pairs = [{name: one.get(name) for name in one.names} for one in (ours, theirs)]
    return {"problem": _difference(pairs[0], pairs[1], ROUNDING), "tensors": len(pairs[0])}


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


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], rounding: float = 0.0) -> str:
    """What differs, in words; "" for nothing. rounding: share of the larger of two entries that they may differ by."""
    if odd := sorted(set(ours) ^ set(theirs)):
        return f"{len(odd)} tensors are in one of the two only, {odd[0]} for example"
    for name, tensor in ours.items():
        one, other = tensor.float(), theirs[name].float()
        off = (one - other).abs() > rounding * torch.maximum(one.abs(), other.abs())
        if one.shape != other.shape or off.any():
            return f"{name} differs in {int(off.sum()):,} of {off.numel():,} entries"
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
