"""Prove an assembled mixture against its sources, after reading it back from disk.

1. Tensors. Every expert's tensors, cut out of the stacked ones, hash to what was read from that expert's checkpoint;
   every averaged tensor is the mean of its sources.
2. One-hot. With all routers forced to expert e, the mixture's logits equal those of a dense model of the seed's own
   class that has e's tensors inside the merged rest; for every e.
3. Gates. With the routers as they are, each feed-forward sublayer's output is Σ_e gate_e · MLP_e of the branches' own
   MLPs, and where the options promise it, every token's gates sum to 1 (then copies of the seed are the seed).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from upcycle.checkpoint import Checkpoint, tensor_sha256
from upcycle.durable import write_json
from upcycle.families import Family, family_of, join_fused
from upcycle.modeling import RoutedExperts, UpcycledForCausalLM
from upcycle.pieces import Piece, plan_pieces
from upcycle.routing import RoutingTrace

TOLERANCE = 1e-4  # of the largest value, in fp32; a misplaced tensor is off by 0.1 and more
SUMS_TO_ONE = ("topk_softmax", "soft")  # at any gate_scale; softmax_topk only with these:
SCALES_TO_ONE = ("sum_to_one", "straight_through")


def prove(mixture_dir: Path, expert_dirs: dict[str, Path]) -> dict:
    """Run the three checks and write them to `proof.json` beside the mixture.

    Raises ValueError: a check failed; the mixture must not be used.
    """
    experts = {name: Checkpoint(path) for name, path in expert_dirs.items()}
    mixture = Checkpoint(mixture_dir)
    model: Any = UpcycledForCausalLM.from_pretrained(mixture_dir, dtype=torch.float32).eval()
    pieces = plan_pieces(model.config, next(iter(experts.values())).names)
    hashed = _check_hashes(mixture, pieces, model.config.experts)
    _check_averages(mixture, pieces, list(experts.values()))
    tokens = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    sublayers, gate_sum = _watch_sublayers(model, tokens)
    errors = {}
    for index, (name, checkpoint) in enumerate(experts.items()):
        dense = _dense_reference(mixture, pieces, model.config, checkpoint, index)
        errors[name] = _largest_difference(model, dense, tokens, index)
        if not errors[name] <= TOLERANCE:
            raise ValueError(
                f"{mixture_dir}: forced to expert {name!r} the mixture's logits differ from the dense model's by "
                f"{errors[name]:.2e} of the largest, expected at most {TOLERANCE}; do not use this mixture"
            )
        for sublayer in sublayers:
            sublayer.subtract(dense, index)
    left = max(sublayer.left() for sublayer in sublayers)
    if not left <= TOLERANCE:
        raise ValueError(
            f"{mixture_dir}: a feed-forward sublayer differs from the gated sum of its experts by {left:.2e} of its largest "
            f"output, expected at most {TOLERANCE}; do not use this mixture"
        )
    result = {
        "expert_tensors_hashed": hashed, "one_hot_errors": errors, "gated_sum_error": left, "mean_gate_sum": gate_sum,
    }  # fmt: skip
    write_json(mixture_dir / "proof.json", result)
    return result


def _check_hashes(mixture: Checkpoint, pieces: list[Piece], experts: list[str]) -> int:
    rows = {row["target"]: row for row in json.loads((mixture.directory / "assembly.json").read_text())["tensors"]}
    count = 0
    for piece in pieces:
        if piece.origin not in ("stacked", "copied"):
            continue
        ours = mixture.get(piece.target)
        for name, expected_parts in rows[piece.target]["sha256"].items():
            parts = piece.unstack(ours, experts.index(name)) if piece.unstack else [ours]
            for part, expected in zip(parts, expected_parts, strict=True):
                if tensor_sha256(part) != expected:
                    raise ValueError(
                        f"{mixture.directory}: {piece.target}: expert {name!r} does not hold the tensors of its branch"
                    )
                count += 1
    return count


def _check_averages(mixture: Checkpoint, pieces: list[Piece], experts: list[Checkpoint]) -> None:
    """Merged tensors against a plain float64 mean; the tolerance is that of the mixture's dtype."""
    if json.loads((mixture.directory / "assembly.json").read_text())["merge"] != "average":
        return
    for piece in pieces:
        if piece.origin != "merged":
            continue
        ours = mixture.get(piece.target)
        mean = piece.cut(torch.stack([expert.get(piece.sources[0]).double() for expert in experts]).mean(0))
        if not torch.allclose(ours.double(), mean, rtol=2 * torch.finfo(ours.dtype).eps, atol=1e-6):
            raise ValueError(
                f"{mixture.directory}: {piece.target} is not the average of {piece.sources[0]} over the experts"
            )


class _Sublayer:
    """Input, output and routing of one layer's experts in one forward; what is left after subtracting gate_e · MLP_e."""

    def __init__(self, family: Family, layer: int, hidden_TD: Tensor, output_TD: Tensor, gates_TE: Tensor):
        self.family, self.layer, self.hidden_TD, self.gates_TE = family, layer, hidden_TD, gates_TE
        self.largest, self.rest_TD = output_TD.abs().max(), output_TD.clone()

    @torch.no_grad()
    def subtract(self, dense: Any, expert: int) -> None:
        mlp = getattr(getattr(dense.base_model, self.family.layers)[self.layer], self.family.mlp)
        self.rest_TD -= self.gates_TE[:, expert, None] * mlp(self.hidden_TD)

    def left(self) -> float:
        return (self.rest_TD.abs().max() / self.largest).item()


@torch.no_grad()
def _watch_sublayers(model: Any, tokens: Tensor) -> tuple[list[_Sublayer], float]:
    """One forward with the routers as they are: each layer's experts, and the mean sum of the gates.

    Raises ValueError: the options promise gates that sum to 1, and some don't.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append((args[0].flatten(0, 1), output.flatten(0, 1)))

    handles = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, RoutedExperts)]
    trace = RoutingTrace(tokens)
    model(tokens, trace=trace)
    for handle in handles:
        handle.remove()
    sublayers, sums = [], []
    for layer, (routing, (hidden, output)) in enumerate(zip(trace.of("ffn"), seen, strict=True)):
        gates_TE = torch.zeros_like(routing.logits).scatter_add(1, routing.experts, routing.gates)
        sublayers.append(_Sublayer(family_of(model.config.seed), layer, hidden, output, gates_TE))
        sums.append(gates_TE.sum(1))
    config, off = model.config, max((total - 1).abs().max().item() for total in sums)
    if (config.router in SUMS_TO_ONE or config.gate_scale in SCALES_TO_ONE) and not off <= TOLERANCE:
        raise ValueError(
            f"{config.router} with gate_scale={config.gate_scale} promises gates that sum to 1; they are off by {off:.2e}"
        )
    return sublayers, torch.stack(sums).mean().item()


def _dense_reference(mixture: Checkpoint, pieces: list[Piece], config, expert: Checkpoint, index: int) -> nn.Module:
    """A dense model of the seed's class: the expert's own tensors, the mixture's merged ones for the rest."""
    family, dtype = family_of(config.seed), mixture.dtype()  # what the sources were cast to
    state: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for piece in pieces:
        if piece.origin == "fresh" or piece.expert not in (None, index):
            continue
        own = None if piece.origin == "merged" else {name: expert.get(name).to(dtype) for name in piece.sources}
        if piece.part is not None:
            (source,) = piece.sources
            fused.setdefault(source, {})[piece.part] = (
                mixture.get(piece.target) if own is None else piece.cut(own[source])
            )
        else:
            state |= {piece.sources[0]: mixture.get(piece.target)} if own is None else own
    for source, parts in fused.items():
        whole = join_fused(parts, family, config.seed)
        state[source] = whole.t() if family.conv1d else whole
    dense = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(expert.directory), dtype=torch.float32)
    missing, unexpected = dense.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    return dense.eval()


@torch.no_grad()
def _largest_difference(model: UpcycledForCausalLM, dense: nn.Module, tokens: Tensor, expert: int) -> float:
    ours = model(tokens, trace=RoutingTrace(tokens, forced=expert)).logits
    theirs = dense(tokens).logits
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
