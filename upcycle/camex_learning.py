"""Learns the curvature and the scores of a CAMEx merge: a few hundred steps on training text, with every weight frozen.

Each step merges the models, θ = θ_m + α Σ s_i M_i τ_i, and takes the mean loss over the models' own texts. Of a mixture, what is
merged is what is no expert's: then each model's text goes through its own experts inside the merged rest, as an oracle router would
send it. s = softmax of one logit a model, M = I and the given weights at first, so that learning starts from the weighted average.
Memory: all models, the merged one and its gradient in fp32, and the activations of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from upcycle.assembly import upcycled_config
from upcycle.batches import Batches, consumed_tokens, run_key
from upcycle.camex_merging import BASES, base_of, combined
from upcycle.checkpoint import Checkpoint, CheckpointWriter, Stored
from upcycle.cost import Shape, placed
from upcycle.durable import write_json
from upcycle.kronecker import FACTORS, OF_A_MERGE, factor_pair
from upcycle.kronecker_map import start
from upcycle.merge import kinds_of
from upcycle.merge_config import MergeConfig
from upcycle.merger import Merger
from upcycle.merging import SEED, Member, Merging
from upcycle.mixture_config import AssembleConfig
from upcycle.pieces import plan_pieces
from upcycle.preflight import check_alike
from upcycle.roles import UNKNOWN, TensorFacts, tensor_facts


class Learned:
    """What is learned, of models by name: `logits` (N,), and `factors`, {model: {tensor: {factor: (R, n, n)}}}."""

    def __init__(
        self,
        weights: Mapping[str, float],
        sides: Mapping[str, tuple[str, ...]],
        sizes: Mapping[str, tuple[int, ...]],
        rank: int,
        rng_seed: int,
        device: torch.device,
    ):
        """sides: which factors a tensor has (`mapped_sides`), of those that have any. sizes: shapes."""
        self.names = list(weights)
        self.logits = nn.Parameter(torch.tensor([math.log(weight) for weight in weights.values()], device=device))
        self.factors: dict[str, dict[str, dict[str, nn.Parameter]]] = {
            model: {
                tensor: _factors(model, tensor, own, sizes[tensor], rank, rng_seed) for tensor, own in sides.items()
            }
            for model in self.names
        }
        for one in self.parameters():
            one.data = one.data.to(device)

    @property
    def scores(self) -> list[Tensor]:
        return list(self.logits.softmax(0))

    def parameters(self) -> list[nn.Parameter]:
        own = [one for tensors in self.factors.values() for factors in tensors.values() for one in factors.values()]
        return [self.logits, *own]

    def pull(self, rate: float) -> None:
        """One step of weight decay towards I: of the first term's factors to I, of the others' to 0."""
        with torch.no_grad():
            for one in self.parameters()[1:]:
                one.mul_(1 - rate)
                one[0].diagonal().add_(rate)

    def statistics(self, model: str) -> dict[str, Tensor]:
        """As `Statistics` reads them."""
        own = {
            f"camex_{factor}/{tensor}": one.detach()
            for tensor, factors in self.factors[model].items()
            for factor, one in factors.items()
        }
        return own | {"camex_score": self.scores[self.names.index(model)].detach()}


def _factors(
    model: str, tensor: str, sides: tuple[str, ...], size: tuple[int, ...], rank: int, rng_seed: int
) -> dict[str, nn.Parameter]:
    lengths = [length for one in size[-len(sides) // 2 :] for length in factor_pair(one)]
    found = {}
    for factor, length in zip(sides, lengths, strict=True):
        generator = torch.Generator().manual_seed(run_key("camex", rng_seed, model, tensor, factor) % 2**63)
        first = start(f"curvature_merge_{factor}", (1, 1, rank, length, length), generator, leading=sides[0])
        found[factor] = nn.Parameter(first[0, 0])
    return found


def mapped_sides(name: str, shape: tuple[int, ...], facts: TensorFacts) -> tuple[str, ...]:
    """Which factors a tensor has: none unless it is a matrix; of embeddings and heads those of the hidden side.

    Raises ValueError: a dimension whose nearest pair of factors has one above LARGEST_FACTOR.
    """
    if len(shape) != 2:
        return ()
    sides = FACTORS[2:] if facts.role in ("embedding", "head") else FACTORS
    for size in shape[1:] if len(sides) == 2 else shape:
        factor_pair(size, f"{name} {shape}: {OF_A_MERGE}")
    return sides


def learn(
    model: nn.Module,
    states: Mapping[str, Mapping[str, Tensor]],
    merged: Collection[str],
    constant: Mapping[str, Tensor],
    facts: Mapping[str, TensorFacts],
    texts: Mapping[str, Batches],
    weights: Mapping[str, float],
    options: Mapping[str, Any],
    rng_seed: int,
    advance: Callable[..., None],
) -> tuple[Learned, list[float]]:
    """Returns what was learned, and the loss of every step.

    model: of the seed's class; its own weights are not read. states: fp32 tensors of every model, the seed's ("seed") too whether or not it has a
    share. merged: the tensors that are learned to be merged. constant: those that are merged otherwise, as they come out. The others are
    each model's own. texts: each model's training text. weights: of those that have a share, above 0. options: of merge=camex
    (camex_merging.camex_solved). Raises FloatingPointError: a loss that is no number.
    """
    shapes = {name: tuple(states[SEED][name].shape) for name in merged}
    sides = {name: mapped_sides(name, shape, facts.get(name, UNKNOWN)) for name, shape in shapes.items()}
    device = next(iter(states[SEED].values())).device
    learned = Learned(weights, {n: one for n, one in sides.items() if one}, shapes, options["rank"], rng_seed, device)
    bases = {name: _base(name, states, weights, options["base"]) for name in merged}
    optimizer = torch.optim.Adam(learned.parameters(), lr=options["lr"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    losses, steps = [], options["steps"]
    for step in range(steps):
        rate = options["lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        with torch.no_grad():
            leaves = {name: _merged(name, learned, states, bases[name], options["alpha"]) for name in merged}
        losses.append(_backward(model, states, constant, leaves, texts, learned.names, step))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"step {step + 1} of {steps}: the loss of the merged model is {losses[-1]}; lower merge=camex's lr ({options['lr']:g}) or alpha "
                f"({options['alpha']:g})"
            )
        for name, leaf in leaves.items():  # tensor by tensor, so that what merging keeps for backward is of one
            if leaf.grad is not None:
                _merged(name, learned, states, bases[name], options["alpha"]).backward(leaf.grad)
        optimizer.step()
        learned.pull(rate * options["decay"])
        advance(step + 1, steps, doing=f"curvature learned, loss {losses[-1]:.3f}")
    return learned, losses


def learn_from(
    config: Mapping[str, Any], models: Mapping[str, Path], data: Mapping[str, Path], advance: Callable[..., None]
) -> tuple[Learned, list[float]]:
    """`learn` from checkpoints and token arrays; config: as in `stages.learn_camex`. models: the seed ("seed") and the branches."""
    checkpoints = {name: Checkpoint(path) for name, path in models.items()}
    seed = checkpoints[SEED]
    check_alike(seed, {name: one for name, one in checkpoints.items() if name != SEED})
    dense = AutoConfig.from_pretrained(models[SEED])
    facts, merge = tensor_facts(dense), config["merge"]
    there = merged_tensors(dense, seed.names, list(models), config["assemble"])
    merged = [name for name in there if "camex" in kinds_of(merge.of(facts.get(name, UNKNOWN).role))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    states = {
        name: {tensor: one.get(tensor).float().to(device) for tensor in seed.names} for name, one in checkpoints.items()
    }
    options, length = config["options"], config["sequence_length"]
    texts = {
        name: Batches(dict(data), config["texts"][name], length, options["batch_sequences"], config["rng_seed"])
        for name in config["weights"]
    }
    model: Any = AutoModelForCausalLM.from_pretrained(models[SEED], dtype=torch.float32)
    model.to(device).eval()
    constant = {
        name: one.to(device)
        for name, one in _otherwise(merge, seed, checkpoints, dense, set(there) - set(merged)).items()
    }
    return learn(model, states, merged, constant, facts, texts, config["weights"], options, config["rng_seed"], advance)


def _otherwise(
    merge: MergeConfig, seed: Checkpoint, models: Mapping[str, Checkpoint], dense: Any, names: Collection[str]
) -> dict[str, Tensor]:
    """The tensors of roles that go another way, merged; none of them by curvature (`merge.learned_options`)."""
    merger = Merger(merge, seed, dense, list(models))
    return {
        name: seed.get(name).float()
        if merger.keeps_seed(name)
        else merger.merged(name, {who: Stored(one, name) for who, one in models.items()}, torch.float32)
        for name in names
    }


def merged_tensors(dense: Any, names: Sequence[str], models: Sequence[str], choice: AssembleConfig | None) -> list[str]:
    """The source tensors that a mixture merges, all of a dense model's without one. What is both merged and an expert's, such as
    a fused projection with shared keys and values, counts as merged."""
    if choice is None:
        return list(names)
    found = placed(Shape.of_config(dense.to_dict()), choice, [name for name in models if name != SEED])
    pieces = plan_pieces(upcycled_config(dense, found, choice), names, found)
    taken = {piece.sources[0] for piece in pieces if piece.origin == "merged"}
    return [name for name in names if name in taken]


def write_learned(learned: Learned, losses: Sequence[float], config: Mapping[str, Any], out: Path) -> None:
    """A directory of statistics for each model, and camex.json: scores, the loss of every step, what was read."""
    options, texts = config["options"], config["texts"]
    for name in learned.names:
        (out / name).mkdir()
        statistics = learned.statistics(name)
        writer = CheckpointWriter(
            out / name, 4_000_000_000, sum(4 * one.numel() for one in statistics.values()), stem="curvature"
        )
        for key, tensor in statistics.items():
            writer.add(key, tensor.cpu().contiguous())
        writer.close()
        sequences = options["steps"] * options["batch_sequences"]
        tokens = consumed_tokens(texts[name], config["rng_seed"], config["sequence_length"], sequences)
        about = {
            "kinds": ["camex"],
            "options": options,
            "sequences": sequences,
            "sequence_length": config["sequence_length"],
            "rng_seed": config["rng_seed"],
        }
        write_json(out / name / "curvature.json", about | {"split": "train", "tokens": tokens})
    scores = dict(zip(learned.names, [one.item() for one in learned.scores], strict=True))
    write_json(out / "camex.json", {"scores": scores, "losses": list(losses)})


def _base(name: str, states: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float], base: str) -> Tensor:
    if base in states and base not in BASES:  # also one without a share
        return states[base][name]
    members = {model: Member(states[model][name], weight) for model, weight in weights.items()}
    return base_of(Merging(name, members, Member(states[SEED][name])), base)


def _merged(
    name: str, learned: Learned, states: Mapping[str, Mapping[str, Tensor]], base: Tensor, alpha: float
) -> Tensor:
    thetas = [states[model][name] for model in learned.names]
    return combined(
        base, thetas, learned.scores, [learned.factors[model].get(name, {}) for model in learned.names], alpha
    )


def _backward(
    model: nn.Module,
    states: Mapping[str, Mapping[str, Tensor]],
    constant: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
    texts: Mapping[str, Batches],
    names: Collection[str],
    step: int,
) -> float:
    """Mean loss over the models' texts, and its gradient on `leaves`, the merged tensors; one model's activations at a time."""
    for leaf in leaves.values():
        leaf.requires_grad_()
    total = 0.0
    for name in names:
        ids = torch.from_numpy(texts[name].batch(step)).to(next(iter(leaves.values())).device)
        logits = functional_call(model, {**states[name], **constant, **leaves}, (ids,), {"use_cache": False}).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()) / len(names)
        loss.backward()
        total += loss.item()
    return total
