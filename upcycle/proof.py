"""Prove an assembled mixture against its sources, after reading it back from disk.

1. Every expert's tensors, cut out of the stacked ones, hash to what was read from that expert's checkpoint.
2. With all routers forced to expert e, the mixture's logits equal those of a dense model of the seed's own class that
   has e's experts' tensors inside the merged rest; for every e.
3. The sum of the gates with the routers as they are: 1 when the mixture of copies of the seed is the seed, less when
   the gates scale the feed-forward output down (BAM's paper form).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from upcycle.assembly import SOURCE_ALIASES, Piece, plan_pieces
from upcycle.attention import join_fused
from upcycle.checkpoint import Checkpoint, tensor_sha256
from upcycle.durable import write_json
from upcycle.modeling import UpcycledForCausalLM
from upcycle.routing import RoutingTrace

TOLERANCE = 1e-4  # of the largest logit, in fp32; a misplaced tensor is off by 0.1 and more


def prove(mixture_dir: Path, expert_dirs: dict[str, Path]) -> dict:
    """Run the three checks and write them to `proof.json` beside the mixture.

    Raises ValueError: a check failed; the mixture must not be used.
    """
    experts = {name: Checkpoint(path) for name, path in expert_dirs.items()}
    mixture = Checkpoint(mixture_dir)
    model: Any = UpcycledForCausalLM.from_pretrained(mixture_dir, dtype=torch.float32).eval()
    pieces = plan_pieces(model.config, next(iter(experts.values())).names)
    tensors = _check_hashes(mixture, pieces, model.config.experts)
    tokens = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    errors = {}
    for index, (name, checkpoint) in enumerate(experts.items()):
        reference = _dense_reference(mixture, pieces, model.config, checkpoint)
        errors[name] = _largest_difference(model, reference, tokens, index)
        if not errors[name] <= TOLERANCE:
            raise ValueError(
                f"{mixture_dir}: forced to expert {name!r} the mixture's logits differ from the dense model's by "
                f"{errors[name]:.2e} of the largest, expected at most {TOLERANCE}; do not use this mixture"
            )
    trace = RoutingTrace(tokens)
    with torch.no_grad():
        model(tokens, trace=trace)
    gate_sum = torch.stack([routing.gates.sum(-1).mean() for routing in trace.of("ffn")]).mean().item()
    result = {"expert_tensors_hashed": tensors, "one_hot_errors": errors, "mean_gate_sum": gate_sum}
    write_json(mixture_dir / "proof.json", result)
    return result


def _check_hashes(mixture: Checkpoint, pieces: list[Piece], experts: list[str]) -> int:
    rows = {row["target"]: row for row in json.loads((mixture.directory / "assembly.json").read_text())["tensors"]}
    count = 0
    for piece in pieces:
        if piece.unstack is None:
            continue
        stacked = mixture.get(piece.target)
        for index, name in enumerate(experts):
            for part, expected in zip(piece.unstack(stacked, index), rows[piece.target]["sha256"][name], strict=True):
                if tensor_sha256(part) != expected:
                    raise ValueError(
                        f"{mixture.directory}: {piece.target}: expert {name!r} does not hold the tensors of its branch"
                    )
                count += 1
    return count


def _dense_reference(mixture: Checkpoint, pieces: list[Piece], config, expert: Checkpoint) -> torch.nn.Module:
    """A dense model of the seed's class: the expert's own stacked tensors, the mixture's merged ones for the rest."""
    dtype = mixture.dtype()  # what the sources were cast to
    state: dict[str, Tensor] = {}
    halves: dict[str, dict[str, Tensor]] = {}
    for piece in pieces:
        if piece.origin == "stacked" and piece.cut is None:
            state.update({source: expert.get(source).to(dtype) for source in piece.sources})
        elif piece.origin == "stacked":
            assert piece.cut is not None
            halves.setdefault(piece.sources[0], {})["query"] = piece.cut(expert.get(piece.sources[0])).to(dtype)
        elif piece.origin == "merged" and piece.cut is not None:
            halves.setdefault(piece.sources[0], {})["key_value"] = mixture.get(piece.target)
        elif piece.origin == "merged":
            state[SOURCE_ALIASES.get(piece.sources[0], piece.sources[0])] = mixture.get(piece.target)
    for source, half in halves.items():
        state[source] = join_fused(half["query"], half["key_value"], config.seed.num_attention_heads)
    dense = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(expert.directory), dtype=torch.float32)
    missing, unexpected = dense.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    return dense.eval()


@torch.no_grad()
def _largest_difference(model: UpcycledForCausalLM, dense: torch.nn.Module, tokens: Tensor, expert: int) -> float:
    ours = model(tokens, trace=RoutingTrace(tokens, forced=expert)).logits
    theirs = dense(tokens).logits
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
