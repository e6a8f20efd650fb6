"""What a model costs, from its sizes alone: parameters, active parameters, FLOPs per token, bytes. No torch.

Shapes: V vocabulary, D hidden, F feed-forward, L layers, H query heads, G key/value heads, d head size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from upcycle.config import AssembleConfig

# The parts of a layer that differ between families; a family not named here is costed like Llama.
PLAIN_MLP = {"gpt_neox"}
BIASED = {"gpt_neox"}
LAYER_NORM_WITH_BIAS = {"gpt_neox"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that decide what a decoder costs. `experts = 1` and `attention_experts = 1` is a dense model."""

    vocab: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool = False
    gated: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_parameters: int = 0  # of one norm
    experts: int = 1
    top_k: int = 1
    attention_experts: int = 1
    shared_kv: bool = False

    @classmethod
    def of_config(cls, config: Mapping) -> Shape:
        """From the fields of a config.json, dense or ours (only those that matter; missing ones mean HF's default)."""
        if config.get("model_type") == "upcycled":
            dense, experts = cls.of_config(config["seed"]), len(config["experts"])
            return dense.as_mixture(experts, config["num_experts_per_tok"], config["attention"], config["kv"])
        family, hidden, heads = config.get("model_type", "llama"), config["hidden_size"], config["num_attention_heads"]
        return cls(
            vocab=config["vocab_size"],
            hidden=hidden,
            feed_forward=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            tied=bool(config.get("tie_word_embeddings", False)),
            gated=family not in PLAIN_MLP,
            attention_bias=config.get("attention_bias", family in BIASED),
            mlp_bias=config.get("mlp_bias", family in BIASED),
            norm_parameters=hidden * (2 if family in LAYER_NORM_WITH_BIAS else 1),
        )

    def as_mixture(self, experts: int, top_k: int, attention: str, kv: str) -> Shape:
        """The shape of a mixture of `experts` copies of this dense model; the words are those of AssembleConfig."""
        soft_attention = attention == "mixture"
        return replace(
            self,
            experts=experts,
            top_k=top_k,
            attention_experts=experts if soft_attention else 1,
            shared_kv=soft_attention and kv == "shared",
        )

    def assembled(self, choice: AssembleConfig, experts: int) -> Shape:
        top_k = experts if choice.router.kind == "soft" else choice.router.top_k
        return self.as_mixture(experts, top_k, choice.attention, choice.kv)

    def _ffn(self) -> int:
        biases = (2 if self.gated else 1) * self.feed_forward + self.hidden
        return (3 if self.gated else 2) * self.hidden * self.feed_forward + (biases if self.mlp_bias else 0)

    def _attention(self) -> int:
        query, key_value = self.heads * self.head_size, 2 * self.kv_heads * self.head_size
        query_output = 2 * self.hidden * query + (query + self.hidden if self.attention_bias else 0)
        keys_values = self.hidden * key_value + (key_value if self.attention_bias else 0)
        return query_output * self.attention_experts + keys_values * (1 if self.shared_kv else self.attention_experts)

    def _routers(self) -> int:
        routed = (self.experts > 1) * self.experts + (self.attention_experts > 1) * self.attention_experts
        return routed * self.hidden

    def _with(self, ffns: int) -> int:
        layer = ffns * self._ffn() + self._attention() + self._routers() + 2 * self.norm_parameters
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.norm_parameters

    @property
    def parameters(self) -> int:
        return self._with(self.experts)

    @property
    def active_parameters(self) -> int:
        """Parameters that take part in one token: K of the E feed-forward experts, all attention experts."""
        return self._with(self.top_k)

    def forward_flops_per_token(self, sequence_length: int) -> int:
        """2 FLOPs per weight of every matrix product, plus causal attention's 2·S·H·d (half of all S² pairs)."""
        lookups = self.vocab * self.hidden * (0 if self.tied else 1)  # an untied embedding is only looked up
        attention = 2 * sequence_length * self.heads * self.head_size * self.attention_experts * self.layers
        return 2 * (self.active_parameters - lookups) + attention

    def train_flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward: three times the forward."""
        return 3 * self.forward_flops_per_token(sequence_length)

    @property
    def train_bytes(self) -> int:
        """Weights, gradients and AdamW's two moments, all fp32 (bf16 is autocast's), without activations."""
        return self.parameters * 16

    def cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        heads = self.kv_heads * (1 if self.shared_kv else self.attention_experts)
        return 2 * self.layers * heads * self.head_size * bytes_per_value
