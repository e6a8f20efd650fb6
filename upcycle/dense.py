"""A mixture as a dense model of the seed's own class again: one of its experts, or all of them merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from upcycle.checkpoint import Checkpoint, CheckpointWriter
from upcycle.config import nearest
from upcycle.directories import check_room, copy_companions
from upcycle.durable import atomic_directory
from upcycle.editing import Edited, forced_logits, index_of, open_mixture
from upcycle.families import family_of, join_fused
from upcycle.merge import METHODS
from upcycle.merging import Member, Merging
from upcycle.modeling import UpcycledForCausalLM
from upcycle.pieces import Piece, dense_config, dense_names, plan_pieces
from upcycle.proof import TOLERANCE


def to_dense(
    directory: str | Path,
    out: str | Path,
    expert: str | None = None,
    merge: str = "average",
    prove: bool = True,
    max_shard_bytes: int = 4_000_000_000,
) -> Edited:
    """Write the mixture in `directory` into `out` as a dense model of its seed's class, which plain transformers loads.

    What the experts share stays as it is. expert: whose feed-forwards (BAM: and attention) it gets; None, the merge of all
    experts' by a method of merge.METHODS that needs nothing else, each with the same weight, whatever the routers say.
    prove: `out` appears only when transformers finds every tensor in it and no other and, with `expert`, when its logits
    are those of the mixture whose routers are all forced to that expert. Memory: a few tensors; for the proof, one model in fp32 at a time.
    Raises ValueError: no mixture there, or of a layout not known here; no such expert or method; `out` is not new or empty.
    """
    mixture, config, out = open_mixture(directory, out)
    known = [name for name, method in METHODS.items() if not (method.needs_seed or method.needs(method.options))]
    if merge not in known:
        raise ValueError(f"merge={merge!r} is not known; expected one of {', '.join(known)}{nearest(merge, known)}")
    chosen = range(config.num_experts) if expert is None else [index_of(expert, config)]
    check_room(out, mixture.size_bytes())
    with atomic_directory(out) as partial:
        writer = CheckpointWriter(partial, max_shard_bytes)
        for name, tensor in dense_tensors(mixture, config, chosen, merge):
            writer.add(name, tensor)
        writer.close()
        seed: Any = dense_config(config)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(seed)]
        seed.architectures = [model_class.__name__]
        seed.dtype, seed.name_or_path = mixture.dtype(), ""
        seed.save_pretrained(partial)
        copy_companions(mixture.directory, partial)
        difference = _prove(mixture.directory, partial, None if expert is None else chosen[0]) if prove else None
    experts = [config.experts[index] for index in chosen]
    return Edited(out, tuple(experts), (), difference)


def dense_tensors(mixture: Checkpoint, config: Any, experts: Sequence[int], merge: str) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor of the dense model: of one expert as it is, of several merged."""
    family, names = family_of(config.seed), [config.experts[index] for index in experts]
    alike: dict[tuple[str, ...], list[Piece]] = {}  # parts of a fused projection, or the norms of the experts
    for piece in plan_pieces(config, dense_names(config)):
        if piece.origin != "fresh":
            alike.setdefault(piece.sources, []).append(piece)
    for sources, pieces in alike.items():
        first = pieces[0]
        if first.part is not None:
            parts = {str(piece.part): _merged(_parts(mixture, piece, experts), names, merge)[0] for piece in pieces}
            whole = join_fused(parts, family, config.seed)
            yield sources[0], whole.t() if family.conv1d else whole
        elif first.origin == "copied":
            norms = [[mixture.get(piece.target)] for piece in pieces if piece.expert in experts]
            yield sources[0], _merged(norms, names, merge)[0]
        else:
            found = _merged(_parts(mixture, first, experts), names, merge)
            found = [torch.cat(found)] if len(sources) == 1 else found  # a family may keep gate and up in one
            # What `cut` turned when the experts were stacked, it turns back: it transposes, or leaves a tensor alone.
            turn = first.cut if first.origin == "stacked" else lambda tensor: tensor
            yield from ((name, turn(tensor)) for name, tensor in zip(sources, found, strict=True))


def _parts(mixture: Checkpoint, piece: Piece, experts: Sequence[int]) -> list[list[Tensor]]:
    """[expert][source]; of a merged tensor, the one that there is."""
    tensor = mixture.get(piece.target)
    if piece.origin == "merged":
        return [[tensor]]
    assert piece.unstack is not None
    return [piece.unstack(tensor, expert) for expert in experts]


def _merged(experts: list[list[Tensor]], names: Sequence[str], merge: str) -> list[Tensor]:
    if len(experts) == 1:
        return experts[0]
    merged = []
    for same in zip(*experts, strict=True):
        merging = Merging("experts", {name: Member(tensor) for name, tensor in zip(names, same, strict=True)})
        merged.append(METHODS[merge](merging).to(same[0].dtype))
    return merged


def _prove(mixture: Path, dense: Path, expert: int | None) -> float | None:
    """The largest difference of logits as a share of the largest, fp32; None where there is nothing to compare with.

    Raises ValueError: transformers misses a tensor or finds one too many, or the logits differ.
    """
    read: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, output_loading_info=True)
    model, info = read
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, info[kind])):
            raise ValueError(
                f"{mixture}: as a dense model, {kind.replace('_', ' ')}: {', '.join(found[:5])} ({len(found)} in all); "
                "nothing was written"
            )
    if expert is None:
        return None
    tokens = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model.eval()(tokens).logits
    del model, read
    ours = forced_logits(UpcycledForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval(), tokens, expert)
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{mixture}: as a dense model its logits differ from those of the mixture forced to that expert by {difference:.2e} "
            f"of the largest, expected at most {TOLERANCE}; nothing was written"
        )
    return difference
