"""What a mixture is when one expert takes everything: a dense model of the seed's own class, made from the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from upcycle.checkpoint import Checkpoint
from upcycle.configuration import UpcycledConfig
from upcycle.experts import Placed
from upcycle.families import family_of, join_fused
from upcycle.pieces import Piece
from upcycle.shards import matrices


class DenseReference:
    """`model`: the mixture's merged tensors, and inside them one expert's own, read from the checkpoints, in fp32.

    Its feed-forwards keep the seed's own class and get as many hidden units as the expert has. With a shared expert beside,
    they get the hidden units of both, since a feed-forward is a sum over them.
    """

    model: Any

    def __init__(
        self,
        mixture: Checkpoint,
        pieces: list[Piece],
        config: UpcycledConfig,
        placed: Placed,
        checkpoints: Mapping[str, Checkpoint],
    ):
        self.mixture, self.config, self.placed, self.checkpoints = mixture, config, placed, checkpoints
        self.family, self.dtype = family_of(config.seed), mixture.dtype()  # what the sources were cast to
        self.shared = {piece.sources[0]: piece for piece in pieces if ".shared_expert." in piece.target}
        self.feed_forward = [piece for piece in pieces if piece.origin == "stacked" and piece.sublayer == "ffn"]
        own = [id(piece) for piece in (*self.shared.values(), *self.feed_forward)]
        self.base = [piece for piece in pieces if piece.origin == "mean" or piece.sublayer == "base"]
        own += [id(piece) for piece in self.base]
        self.others = [piece for piece in pieces if piece.origin != "fresh" and id(piece) not in own]
        directory = next(iter(checkpoints.values())).directory
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32).eval()
        self._attention: int | None = None

    def attention_expert(self, index: int) -> int:
        """The attention expert that goes with a feed-forward expert: of its name without the shard; else in turn."""
        names = [expert.name for expert in self.placed.attention]
        own = self.placed.experts[index].name.partition("/")[0]
        return names.index(own) if own in names else index % max(len(names), 1)

    def take(self, index: int) -> None:
        """Become feed-forward expert `index`, with the shared one's share, and its attention expert."""
        attention = self.attention_expert(index)
        if attention != self._attention:
            self._load(attention)
            self._attention = attention
        self.take_feed_forward(index, shared=bool(self.shared))

    def _load(self, attention: int) -> None:
        """Everything but the feed-forwards of mixtures."""
        state: dict[str, Tensor] = {}
        fused: dict[str, dict[str, Tensor]] = {}
        for piece in self.others:
            if piece.expert not in (None, attention):
                continue
            source = piece.sources[0]
            if piece.origin == "merged":
                tensor = self.mixture.get(piece.target)
            else:
                own = self.checkpoints[self.placed.attention[attention].source].get(source).to(self.dtype)
                tensor = own if piece.part is None else piece.cut(own)
            if piece.part is None:
                state[source] = tensor
            else:
                fused.setdefault(source, {})[piece.part] = tensor
        for source, parts in fused.items():
            whole = join_fused(parts, self.family, self.config.seed)
            state[source] = whole.t() if self.family.conv1d else whole
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        later = {source for piece in self.feed_forward for source in piece.sources}
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        assert not unexpected and set(missing) <= tied | later, (missing, unexpected)

    def take_feed_forward(self, index: int | None, shared: bool) -> None:
        """The feed-forwards of expert `index`, of the shared expert (index None), or of both, each with its share."""
        half = self.config.shared_gate == "half" and shared and index is not None
        for piece in self.feed_forward:
            found = [self._expert(piece, index)] if index is not None else []
            found += [self._shared(piece)] if shared else []
            made = []
            for parts in zip(*found, strict=True):  # one gate, or one up, of either
                parts = [part.float() * (0.5 if half and piece.axis != 0 else 1.0) for part in parts]
                made.append(sum(parts) if piece.axis is None else torch.cat(parts, piece.axis))
            stored = [torch.cat(made)] if len(piece.sources) == 1 else made
            for source, tensor in zip(piece.sources, stored, strict=True):
                self._put(source, tensor)

    def take_base(self) -> None:
        """The feed-forwards of the base expert, as the mixture has them."""
        for piece in self.base:
            rows = self.mixture.get(piece.target).float()
            for source, tensor in zip(piece.sources, rows.chunk(len(piece.sources)), strict=True):
                self._put(source, tensor)

    def _expert(self, piece: Piece, index: int) -> list[Tensor]:
        expert = self.placed.experts[index]
        cuts = {
            name: [piece.cut(self.checkpoints[name].get(source).to(self.dtype)) for source in piece.sources]
            for name in {chunk.source for chunk in expert.chunks}
        }
        return piece.carve(expert, cuts)

    def _shared(self, piece: Piece) -> list[Tensor]:
        stored = []
        for source in piece.sources:
            if (own := self.shared[source]).origin == "merged":
                stored.append(piece.cut(self.mixture.get(own.target)))
            else:
                stored.append(piece.cut(self.checkpoints["seed"].get(source).to(self.dtype)))
        return matrices(stored, piece.axis == 0 and self.family.gated)

    def _put(self, name: str, tensor: Tensor) -> None:
        """Replace a parameter of the dense model by one of another size. tensor: (out, in), or a bias."""
        owner, _, kind = name.rpartition(".")
        linear: Any = self.model.get_submodule(owner)
        conv1d = isinstance(linear, Conv1D)
        setattr(linear, kind, nn.Parameter(tensor.t().contiguous() if conv1d and tensor.dim() == 2 else tensor))
        if conv1d and kind == "weight":
            linear.nf = tensor.shape[0]
