"""Prove an assembled mixture against its sources, after reading it back from disk.

1. Tensors. Every expert's tensors, cut out of the stacked ones, are what its sources' checkpoints, read once more, give it:
   the whole, certain hidden units, or some of them drawn anew (assembly.json says which). They hash to what was written
   down at assembly. A shared expert is the seed's own. Every merged tensor is the mean of its sources, the seed's own, or what
   the method that was asked for makes of them; proof.json counts them (those that need curvature are not compared).
2. One-hot. With all routers forced to expert e, the mixture's logits equal those of a dense model of the seed's own
   class that has e's tensors (and the shared expert's) inside the merged rest; for every e.
   Where weights are merged, the base expert alone too.
3. Gates. With the routers as they are, each feed-forward sublayer's output is Σ_e gate_e · MLP_e, of MLPs of the seed's own
   class, with the shared expert's share; and where the options promise it, every token's gates sum to 1 (then copies of the
   seed are the seed).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from upcycle.checkpoint import Checkpoint, Stored, tensor_sha256
from upcycle.configuration import UpcycledConfig
from upcycle.dense_reference import DenseReference
from upcycle.durable import write_json
from upcycle.experts import Placed
from upcycle.families import Family, family_of
from upcycle.merge import KEPT, by_linears_only, kinds_of
from upcycle.merge_config import MergeConfig, from_record
from upcycle.merger import Merger
from upcycle.modeling import RoutedExperts, UpcycledForCausalLM
from upcycle.pieces import Piece, dense_config, plan_pieces
from upcycle.roles import UNKNOWN, tensor_facts
from upcycle.router import RoutingTrace
from upcycle.store import ignore

TOLERANCE = 1e-4  # of the largest value, in fp32; a misplaced tensor is off by 0.1 and more


def prove(mixture_dir: Path, model_dirs: Mapping[str, Path], advance: Callable[..., None] = ignore) -> dict:
    """Run the three checks and write them to `proof.json` beside the mixture.

    model_dirs: the seed ("seed") and the branches, by name; at least those that the mixture has something of.
    Raises ValueError: a check failed, the mixture must not be used; a model that it was made from is not given.
    """
    mixture, placed = Checkpoint(mixture_dir), _placed(mixture_dir)
    model: Any = UpcycledForCausalLM.from_pretrained(mixture_dir, dtype=torch.float32).eval()
    record = json.loads((mixture_dir / "assembly.json").read_text())
    config, merge = model.config, from_record(record["merge"])
    if [expert.name for expert in placed.experts] != config.experts:
        raise ValueError(f"{mixture_dir}: assembly.json and config.json name other experts; assemble the mixture again")
    if placed.drop_fraction and record.get("edits"):
        raise ValueError(
            f"{mixture_dir} has experts that were drawn anew in part and was edited afterwards; what each came from is proved by "
            "the edit itself (proof.json)"
        )
    needed = _needed(placed, config, merge)
    if absent := [name for name in needed if name not in model_dirs]:
        raise ValueError(
            f"{mixture_dir} was made from {', '.join(needed)}; {absent[0]} is not given to prove it against"
        )
    checkpoints = {name: Checkpoint(model_dirs[name]) for name in needed}
    pieces = plan_pieces(config, checkpoints[needed[0]].names, placed)
    steps = len(placed.experts) + 1  # the tensors, then each expert alone
    hashed = _check_hashes(mixture, pieces, placed, checkpoints)
    compared = _check_merged(mixture, pieces, checkpoints, config, placed.models, merge)
    advance(1, steps, doing="proved: tensors")
    tokens = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    dense = DenseReference(mixture, pieces, config, placed, checkpoints)
    if config.merges_weights:
        found = _of_merged_weights(model, dense, tokens, advance)
    else:
        found = _of_gated_outputs(model, dense, tokens, advance)
    return write_proof(mixture_dir, {"expert_tensors_hashed": hashed, "merged_tensors_compared": compared, **found})


def _of_gated_outputs(model: Any, dense: DenseReference, tokens: Tensor, advance: Callable[..., None]) -> dict:
    """Checks 2 and 3."""
    sublayers, gate_sum = _watch_sublayers(model, tokens)
    errors = {}
    for index in range(len(dense.placed.experts)):
        _check_one_hot(model, dense, tokens, index, errors, advance)
        dense.take_feed_forward(index, shared=False)
        for sublayer in sublayers:
            sublayer.subtract(dense.model, sublayer.gates_TE[:, index, None])
    if model.config.shared_expert != "none":
        dense.take_feed_forward(None, shared=True)
        for sublayer in sublayers:
            sublayer.subtract(dense.model, 1.0)
    left = max(sublayer.left() for sublayer in sublayers)
    if not left <= TOLERANCE:
        raise ValueError(
            f"{dense.mixture.directory}: a feed-forward sublayer differs from the gated sum of its experts by {left:.2e} of its largest "
            f"output, expected at most {TOLERANCE}; do not use this mixture"
        )
    return {"one_hot_errors": errors, "gated_sum_error": left, "mean_gate_sum": gate_sum}


def _of_merged_weights(model: Any, dense: DenseReference, tokens: Tensor, advance: Callable[..., None]) -> dict:
    """Check 2 where experts are merged in weight space, and the base alone. With α = 1 and no election, B + M(E − B) is E at first."""
    combine, errors = model.config.combine, {}
    if combine["alpha"] == 1 and combine["election"] == "none":
        for index in range(len(dense.placed.experts)):
            _check_one_hot(model, dense, tokens, index, errors, advance)
    found: dict[str, Any] = {"one_hot_errors": errors}
    alone = model.config.rule("ffn", model.config.routed[0])
    if alone.first == "base" and combine["update"] == "none" and not dense.shared:
        tokens = tokens[:, : alone.tokens]  # the first segment
        dense.take(0)
        dense.take_base()
        with torch.no_grad():
            theirs = dense.model(tokens).logits
            forced = {"attention": dense.attention_expert(0)}
            ours = model(tokens, trace=RoutingTrace(forced=forced)).logits
        found["base_error"] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        _check_difference(dense, found["base_error"], "with its base expert alone")
    return found


def _check_one_hot(
    model: Any,
    dense: DenseReference,
    tokens: Tensor,
    index: int,
    errors: dict[str, float],
    advance: Callable[..., None],
) -> None:
    dense.take(index)
    name, count = dense.placed.experts[index].name, len(dense.placed.experts)
    errors[name] = largest_difference(model, dense, tokens, index)
    _check_difference(dense, errors[name], f"forced to expert {name!r}")
    advance(index + 2, count + 1, doing=f"proved: expert {name}")


def _check_difference(dense: DenseReference, difference: float, when: str) -> None:
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{dense.mixture.directory}: {when} the mixture's logits differ from the dense model's by {difference:.2e} of the largest, "
            f"expected at most {TOLERANCE}; do not use this mixture"
        )


def _needed(placed: Placed, config: UpcycledConfig, merge: MergeConfig) -> list[str]:
    """The models that the mixture has something of, by name."""
    sources = [chunk.source for expert in (*placed.experts, *placed.attention) for chunk in expert.chunks]
    seed = ["seed"] * (config.shared_expert == "seed" or merge.method != "average" or bool(merge.roles))
    return list(dict.fromkeys([*placed.models, *sources, *seed]))


def write_proof(mixture_dir: Path, result: Mapping[str, Any]) -> dict:
    """`proof.json`: what was found, and of which weights."""
    mixture = Checkpoint(mixture_dir)
    hashes = {name: tensor_sha256(mixture.get(name)) for name in mixture.names}
    proof = {**result, "weights_sha256": weights_sha256(hashes)}
    write_json(mixture_dir / "proof.json", proof)
    return proof


def weights_sha256(hashes: Mapping[str, str]) -> str:
    """One hash of all tensors, from `tensor_sha256` of each; the same in however many shards they lie."""
    return hashlib.sha256(json.dumps(dict(hashes), sort_keys=True).encode()).hexdigest()


def changed_experts(mixture_dir: Path) -> tuple[list[str], int]:
    """(tensors of experts that no longer hash to what assembly.json has of them, how many there are); needs no sources.

    Raises ValueError: see `pieces.plan_pieces`.
    """
    mixture, placed = Checkpoint(mixture_dir), _placed(mixture_dir)
    rows = json.loads((mixture_dir / "assembly.json").read_text())["tensors"]
    written = {row["target"]: row["sha256"] for row in rows if "sha256" in row}
    pieces = plan_pieces(
        UpcycledConfig.from_pretrained(mixture_dir), sorted({s for row in rows for s in row["sources"]}), placed
    )
    changed, count = [], 0
    for piece in (piece for piece in pieces if piece.target in written):
        for name, _, parts in _held(mixture.get(piece.target), piece, placed, written[piece.target]):
            for part, source, expected in zip(parts, piece.sources, written[piece.target][name], strict=True):
                count += 1
                if tensor_sha256(part) != expected:
                    changed.append(f"{source} of {name}")
    return changed, count


def _held(
    ours: Tensor, piece: Piece, placed: Placed, whose: Mapping[str, Any]
) -> Iterator[tuple[str, int, list[Tensor]]]:
    """What a tensor of the mixture has of each expert: (its name, its index, its parts). whose: assembly.json's sha256."""
    if piece.unstack is None:
        yield next(iter(whose)), 0, [ours]
        return
    for index, expert in enumerate(placed.of(piece.sublayer)):
        yield expert.name, index, piece.unstack(ours, index)


def _placed(mixture_dir: Path) -> Placed:
    return TypeAdapter(Placed).validate_python(json.loads((mixture_dir / "assembly.json").read_text())["placed"])


def _check_hashes(
    mixture: Checkpoint, pieces: list[Piece], placed: Placed, checkpoints: Mapping[str, Checkpoint]
) -> int:
    """Every tensor of an expert, and of the seed's shared one: as its sources give it, and as assembly.json has it."""
    rows = {row["target"]: row for row in json.loads((mixture.directory / "assembly.json").read_text())["tensors"]}
    dtype, count = mixture.dtype(), 0
    for piece in pieces:
        if piece.origin not in ("stacked", "copied"):
            continue
        ours, hashes = mixture.get(piece.target), rows[piece.target]["sha256"]
        cuts = {
            name: [piece.cut(checkpoints[name].get(source).to(dtype)) for source in piece.sources]
            for name in piece.models(placed)
        }
        for name, index, parts in _held(ours, piece, placed, hashes):
            whole = piece.unstack is None
            made = cuts[piece.models(placed)[0]] if whole else piece.carve(placed.of(piece.sublayer)[index], cuts)
            for part, own, written in zip(parts, made, hashes[name], strict=True):
                if tensor_sha256(part) != written or not torch.equal(part, own):
                    raise ValueError(
                        f"{mixture.directory}: {piece.target}: expert {name!r} does not hold the tensors of its branch"
                    )
                count += 1
    return count


def _check_merged(
    mixture: Checkpoint,
    pieces: list[Piece],
    checkpoints: Mapping[str, Checkpoint],
    config: UpcycledConfig,
    models: Sequence[str],
    merge: MergeConfig,
) -> int:
    """How many merged tensors were compared: averages with a plain float64 mean, to the tolerance of the mixture's dtype; the
    seed's own to the bit; others with the same merge made again. Those that curvature decided, which is gone, are not."""
    dense, compared = dense_config(config), 0
    facts = tensor_facts(dense)
    merger = Merger(merge, checkpoints.get("seed", mixture), dense, list(models))
    for piece in (piece for piece in pieces if piece.origin == "mean"):
        rows = [
            torch.cat([piece.cut(checkpoints[name].get(one)) for one in piece.sources])
            for name in config.expert_sources
        ]
        mean, ours = torch.stack([one.double() for one in rows]).mean(0), mixture.get(piece.target)
        if not torch.allclose(ours.double(), mean, rtol=2 * torch.finfo(ours.dtype).eps, atol=1e-6):
            raise ValueError(f"{mixture.directory}: {piece.target} is not the mean of the experts'")
        compared += 1
    for piece in (piece for piece in pieces if piece.origin == "merged"):
        ours, (source,) = mixture.get(piece.target), piece.sources
        found = facts.get(source, UNKNOWN)
        way = merge.of(found.role)
        if way.method == KEPT:
            what, same = "the seed's own", torch.equal(ours, piece.cut(checkpoints["seed"].get(source).to(ours.dtype)))
        elif way.method in ("average", "weighted") or by_linears_only(way, found.in_axis):
            shares = [merge.weights.get(name, 1.0) for name in models]
            each = torch.stack([checkpoints[name].get(source).double() for name in models])
            mean = piece.cut(torch.tensordot(torch.tensor(shares).double(), each, 1) / sum(shares))
            what = "the average of the experts'"
            same = torch.allclose(ours.double(), mean, rtol=2 * torch.finfo(ours.dtype).eps, atol=1e-6)
        elif kinds_of(way):
            continue
        else:
            stored = {name: Stored(checkpoints[name], source) for name in models}
            again = piece.cut(merger.merged(source, stored, ours.dtype))
            what, same = f"the {way.method} merge of the experts'", torch.equal(ours, again)
        if not same:
            raise ValueError(f"{mixture.directory}: {piece.target} is not {what} {source}")
        compared += 1
    return compared


class _Sublayer:
    """Input, output and routing of one layer's experts in one forward; what is left after subtracting gate_e · MLP_e.

    share: by what the sublayer multiplies the sum of its experts, shared and routed.
    """

    def __init__(
        self, family: Family, layer: int, hidden_TD: Tensor, output_TD: Tensor, gates_TE: Tensor, share: float
    ):
        self.family, self.layer, self.hidden_TD, self.gates_TE, self.share = family, layer, hidden_TD, gates_TE, share
        self.largest, self.rest_TD = output_TD.abs().max(), output_TD.clone()

    @torch.no_grad()
    def subtract(self, dense: Any, gates_T1: Tensor | float) -> None:
        mlp = getattr(getattr(dense.base_model, self.family.layers)[self.layer], self.family.mlp)
        self.rest_TD -= self.share * gates_T1 * mlp(self.hidden_TD)

    def left(self) -> float:
        return (self.rest_TD.abs().max() / self.largest).item()


@torch.no_grad()
def _watch_sublayers(model: Any, tokens: Tensor) -> tuple[list[_Sublayer], float]:
    """One forward with the routers as they are: each mixture layer's experts, and the mean sum of the gates.

    Raises ValueError: the options promise gates that sum to 1, and some don't.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append((args[0].flatten(0, 1), output.flatten(0, 1)))

    config = model.config
    handles = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, RoutedExperts)]
    experts_B = torch.arange(len(tokens)) % config.num_experts  # oracle routers ask for them
    trace = RoutingTrace(expert_B=experts_B)
    model(tokens, trace=trace)
    for handle in handles:
        handle.remove()
    share = 0.5 if config.shared_expert != "none" and config.shared_gate == "half" else 1.0
    sublayers, sums = [], []
    for layer, routing, (hidden, output) in zip(config.routed, trace.of("ffn"), seen, strict=True):
        gates_TE = torch.zeros_like(routing.logits).scatter_add(1, routing.experts, routing.gates)
        sublayers.append(_Sublayer(family_of(config.seed), layer, hidden, output, gates_TE, share))
        sums.append(gates_TE.sum(1))
    off = max((total - 1).abs().max().item() for total in sums)
    if config.gates_sum_to_one and not off <= TOLERANCE:
        raise ValueError(
            f"{config.router} with gate_scale={config.gate_scale} promises gates that sum to 1; they are off by {off:.2e}"
        )
    return sublayers, torch.stack(sums).mean().item()


@torch.no_grad()
def largest_difference(model: UpcycledForCausalLM, dense: DenseReference, tokens: Tensor, index: int) -> float:
    forced = {"ffn": index, "attention": dense.attention_expert(index)}
    ours = model(tokens, trace=RoutingTrace(forced=forced)).logits
    theirs = dense.model(tokens).logits
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
