"""What a dense model's loss looks like around its weights, measured on training text: Fisher, Gram, K-FAC, Hessian diagonal.

One pass, sequence by sequence. Sums lie in memory-mapped files, so large ones may be written out while others are added to.
Random numbers are keyed by the sequence, so any number of ranks measures the same. Shapes: S sequence, T tokens predicted from,
V vocabulary, I in- and O out-features of a linear.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from upcycle.batches import Batches, random_words, run_key
from upcycle.checkpoint import CheckpointWriter
from upcycle.config import CurvatureConfig
from upcycle.durable import write_json
from upcycle.losses import next_token_labels
from upcycle.team import ALONE, Team

# What each kind is called in curvature.safetensors, before "/" and the tensor's name.
STATISTICS = {
    "fisher": ("fisher",),
    "gram": ("gram",),
    "kfac": ("kfac_in", "kfac_out"),
    "hessian": ("hessian",),
    "gradient": ("gradient",),
}

SHARD_BYTES = 4_000_000_000


class Sums:
    """Tensors to add to, each in a mapped file of `scratch`."""

    def __init__(self, scratch: Path):
        self.scratch, self.tensors = scratch, {}

    def add(self, name: str, value: Tensor) -> None:
        if name not in self.tensors:
            path = self.scratch / f"{len(self.tensors)}.sum"
            with path.open("wb") as file:  # now, for a disk that is full later would end the process
                os.posix_fallocate(file.fileno(), 0, max(1, 4 * value.numel()))
            flat = torch.from_file(str(path), shared=True, size=value.numel(), dtype=torch.float32)
            self.tensors[name] = flat.zero_().view(value.shape)
        self.tensors[name].add_(value.detach().float().cpu())


def linears(model: nn.Module, largest: int) -> Iterator[tuple[str, nn.Module, int, int]]:
    """(name of the weight, module, I, O) of every linear whose weight is no embedding's and whose I and O are not above
    `largest`: what has Gram matrices and Kronecker factors."""
    embedded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or id(module.weight) in embedded:
            continue
        inside, outside = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        if max(inside, outside) <= largest:
            yield f"{name}.weight", module, inside, outside


def sampled_labels(logits_TV: Tensor, key: int, number: int) -> Tensor:
    """(T,) a label of each position from the model's own prediction, by sequence `number`'s own random numbers."""
    uniform_T = torch.from_numpy((random_words(key, number, len(logits_TV)) >> np.uint64(11)) * 2.0**-53)
    cumulative_TV = logits_TV.double().softmax(-1).cumsum(-1)
    drawn_T1 = (uniform_T.to(logits_TV.device) * cumulative_TV[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative_TV, drawn_T1, right=True).squeeze(-1).clamp_max(logits_TV.shape[1] - 1)


def signs(shape: torch.Size, key: int, number: int) -> Tensor:
    """±1, as likely as each other: a Rademacher probe."""
    words = random_words(key, number, math.ceil(shape.numel() / 64))
    bits = np.unpackbits(words.view(np.uint8))[: shape.numel()]
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).view(shape)


def measure(
    model: PreTrainedModel,
    batches: Batches,
    config: CurvatureConfig,
    scratch: Path,
    advance: Callable[[int, int], None] = lambda done, total: None,
    team: Team = ALONE,
) -> dict[str, Tensor]:
    """{"KIND/TENSOR": fp32 statistic} of `config.sequences` sequences, the first of `batches`, on every rank of `team`.

    fisher: of a tensor's shape, (1/N) Σ_n (∇ Σ_t log p(y_t | x_n))², y_t drawn from p given the real context (labels: sampled)
    or as they are (observed: the empirical Fisher). gram: (I, I) of a linear's inputs, X^T X / T. kfac_in, kfac_out: (I, I) mean
    of x x^T over tokens, (O, O) of g g^T summed over a sequence's tokens, g the gradient of that sum by the linear's output;
    their Kronecker product stands for the Fisher matrix. hessian: (1/N) Σ_n v ⊙ ∇²(Σ_t −log p(x_t)) v, v of random signs.
    gradient: (1/N) Σ_n ∇ Σ_t −log p(x_t).
    scratch: a directory for the sums. Raises ValueError: batches of more than one sequence; more ranks than sequences.
    """
    if batches.batch_sequences != 1:
        raise ValueError(f"curvature goes by single sequences, got batches of {batches.batch_sequences}")
    if config.sequences < team.size:
        raise ValueError(
            f"sequences={config.sequences} is fewer than the {team.size} processes that share them; raise curvature.sequences, or start "
            "fewer processes"
        )
    sums = Sums(scratch)
    model = model.to(team.device).eval().requires_grad_(True)
    mine = range(team.rank, config.sequences, team.size)
    for number in mine:
        ids_1S = torch.from_numpy(batches.batch(number)).to(team.device)
        if {"fisher", "gram", "kfac", "gradient"} & set(config.kinds):
            _first_order(model, ids_1S, config, number, sums)
        if "hessian" in config.kinds:
            _second_order(model, ids_1S, config, number, sums)
        advance(min(number + team.size, config.sequences), config.sequences)
    for name in sorted(sums.tensors):
        team.add(sums.tensors[name])
        sums.tensors[name] /= config.sequences
    return dict(sorted(sums.tensors.items()))


def _first_order(model: PreTrainedModel, ids_1S: Tensor, config: CurvatureConfig, number: int, sums: Sums) -> None:
    """Add one sequence's Fisher diagonal, gradient, Gram matrices and Kronecker factors."""
    backward = bool({"fisher", "kfac", "gradient"} & set(config.kinds))
    with ExitStack() as hooks, torch.set_grad_enabled(backward):
        for name, module, _, _ in linears(model, config.largest_factor):
            hooks.enter_context(_seen(module, name, config.kinds, sums))
        logits_TV = model(input_ids=ids_1S, use_cache=False).logits[0, :-1].float()
        if not backward:
            return
        if config.labels == "sampled":
            labels_T = sampled_labels(logits_TV.detach(), run_key("labels", config.rng_seed), number)
        else:
            labels_T = ids_1S[0, 1:]
        nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum").backward()
    for name, parameter in model.named_parameters():
        if "fisher" in config.kinds and parameter.grad is not None:
            sums.add(f"fisher/{name}", parameter.grad.float().square())
        if "gradient" in config.kinds and parameter.grad is not None:
            sums.add(f"gradient/{name}", parameter.grad)
        parameter.grad = None


def _positions(x: Tensor) -> Tensor:
    """(T, features) of one sequence, with or without the batch's axis, less the last position."""
    return x.reshape(-1, x.shape[-1])[:-1].float()


def _products(g: Tensor) -> Tensor:
    """Σ g g^T over positions; the last one's g is 0."""
    rows = _positions(g)
    return rows.T @ rows


@contextmanager
def _seen(module: nn.Module, name: str, kinds: tuple[str, ...], sums: Sums):
    """While open, the linear's inputs and the gradients of its outputs are added up. The last position predicts nothing: its
    input is left out, and its gradient is 0."""

    def inputs(_module, arguments):
        x_TI = _positions(arguments[0].detach())
        gram_II = x_TI.T @ x_TI / len(x_TI)
        for kind in kinds:
            if kind in ("gram", "kfac"):
                sums.add(f"{STATISTICS[kind][0]}/{name}", gram_II)

    def outputs(_module, _arguments, out_1SO):
        if out_1SO.requires_grad:
            out_1SO.register_hook(lambda g_1SO: sums.add(f"kfac_out/{name}", _products(g_1SO)))

    handles = []
    if "gram" in kinds or "kfac" in kinds:
        handles.append(module.register_forward_pre_hook(inputs))
    if "kfac" in kinds:
        handles.append(module.register_forward_hook(outputs))
    yield
    for handle in handles:
        handle.remove()


def _second_order(model: PreTrainedModel, ids_1S: Tensor, config: CurvatureConfig, number: int, sums: Sums) -> None:
    """Add one sequence's estimate of the Hessian's diagonal: v ⊙ Hv (Hutchinson), of the loss on the text itself."""
    named = list(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the only one that can be differentiated twice
        logits_SV = model(input_ids=ids_1S, use_cache=False).logits[0].float()
        nats = nn.functional.cross_entropy(logits_SV, next_token_labels(ids_1S)[0], reduction="sum")
        gradients = torch.autograd.grad(nats, [p for _, p in named], create_graph=True, materialize_grads=True)
        probes = [signs(p.shape, run_key("probe", config.rng_seed, name), number).to(p) for name, p in named]
        along = torch.stack([(g * v).sum() for g, v in zip(gradients, probes, strict=True)]).sum()
        curved = torch.autograd.grad(along, [p for _, p in named], materialize_grads=True)
    for (name, _), v, hv in zip(named, probes, curved, strict=True):
        sums.add(f"hessian/{name}", v * hv)


def write_statistics(found: dict[str, Tensor], config: CurvatureConfig, tokens: dict[str, int], out: Path) -> None:
    """curvature.safetensors and curvature.json. The norm of the Fisher's diagonal over all tensors, which Fisher merging divides
    by, is one more statistic. tokens: read of each domain."""
    writer = CheckpointWriter(out, SHARD_BYTES, sum(4 * tensor.numel() for tensor in found.values()), stem="curvature")
    for name, tensor in found.items():
        writer.add(name, tensor)
    if squares := [tensor.double().square().sum() for name, tensor in found.items() if name.startswith("fisher/")]:
        writer.add("fisher_norm", torch.stack(squares).sum().sqrt().float())
    writer.close()
    write_json(out / "curvature.json", asdict(config) | {"tokens": tokens, "statistics": len(found)})
