"""What a model costs, from its sizes alone: parameters, active parameters, FLOPs per token, bytes. No torch.

Shapes: V vocabulary, D hidden, d head size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from upcycle.config import AssembleConfig


@dataclass(frozen=True, kw_only=True)
class Details:
    """How a family's layers are counted. Strings name the config field that decides (False where it is absent).

    norms: of D features, in one layer; norm_bias: they have biases. query_key_norms: "head" (d features), "all" (every
    head has its own), or None.
    """

    gated: bool = True
    mlp_bias: bool | str = False
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    norms: int = 2
    norm_bias: bool = False
    query_key_norms: str | None = None
    norms_if: bool | str = True
    head_bias: bool = False


LLAMA = Details(mlp_bias="mlp_bias", qkv_bias="attention_bias", output_bias="attention_bias")
OLMO2 = replace(LLAMA, mlp_bias=False, query_key_norms="all")
BIASED = Details(gated=False, mlp_bias=True, qkv_bias=True, output_bias=True, norm_bias=True)
DETAILS = {
    "llama": LLAMA,
    "mistral": Details(),
    "qwen2": Details(qkv_bias=True),
    "qwen3": replace(LLAMA, mlp_bias=False, query_key_norms="head"),
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "cohere": replace(OLMO2, norms=1, norms_if="use_qk_norm"),
    "cohere2": replace(LLAMA, mlp_bias=False, norms=1),
    "granite": LLAMA,
    "smollm3": LLAMA,
    "gemma2": replace(LLAMA, mlp_bias=False, norms=4),
    "gemma3_text": replace(LLAMA, mlp_bias=False, norms=4, query_key_norms="head"),
    "stablelm": Details(qkv_bias="use_qkv_bias", norm_bias=True, query_key_norms="all", norms_if="qk_layernorm"),
    "glm4": Details(qkv_bias="attention_bias", norms=4),
    "phi": replace(BIASED, norms=1, query_key_norms="head", norms_if="qk_layernorm", head_bias=True),
    "phi3": Details(),
    "seed_oss": Details(qkv_bias="attention_bias", output_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "nemotron": replace(LLAMA, gated=False, norm_bias=True),
    "starcoder2": replace(BIASED, mlp_bias="use_bias", qkv_bias="use_bias", output_bias="use_bias"),
    "gpt_neox": replace(BIASED, qkv_bias="attention_bias", output_bias="attention_bias"),
    "gpt2": BIASED,
}
# Fields under other names, and what transformers takes for a field that config.json leaves out.
ALIASES = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
DEFAULTS: dict[str, dict] = {
    "gpt_neox": {"attention_bias": True},
    **{family: {"attention_bias": True} for family in ("seed_oss", "glm4")},
    "starcoder2": {"use_bias": True, "tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": True, "n_positions": 1024},
    **{family: {"tie_word_embeddings": True} for family in ("cohere", "cohere2", "gemma2", "gemma3_text", "smollm3")},
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that decide what a decoder costs. `experts = 1` and `attention_experts = 1` is a dense model.

    Parameters of one layer: `mlp`, of one expert; `queries`, all that every attention expert has, and `keys_values`,
    which experts may share; `norms`. Of the model: `positions`, learned ones;
    `outside`, all but those, layers, embedding and head.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    queries: int
    keys_values: int
    norms: int
    outside: int
    positions: int = 0
    tied: bool = False
    experts: int = 1
    top_k: int = 1
    attention_experts: int = 1
    shared_kv: bool = False

    @classmethod
    def of_config(cls, config: Mapping) -> Shape:
        """From the fields of a config.json, dense or ours. A family without DETAILS is counted like Llama."""
        if config.get("model_type") == "upcycled":
            dense, experts = cls.of_config(config["seed"]), len(config["experts"])
            return dense.as_mixture(experts, config["num_experts_per_tok"], config["attention"], config["kv"])
        family = config.get("model_type", "llama")
        details, found = DETAILS.get(family, LLAMA), DEFAULTS.get(family, {}) | dict(config)
        found |= {name: found[alias] for alias, name in ALIASES.items() if alias in found}

        def on(flag: bool | str) -> bool:
            return bool(found.get(flag, False)) if isinstance(flag, str) else flag

        hidden, heads = found["hidden_size"], found["num_attention_heads"]
        kv_heads, size = found.get("num_key_value_heads") or heads, found.get("head_dim") or hidden // heads
        feed_forward = found.get("intermediate_size") or found.get("n_inner") or 4 * hidden
        up = (2 if details.gated else 1) * feed_forward
        norm = hidden * (2 if details.norm_bias else 1)
        query_norm, key_norm = _query_key_norms(details, heads * size, kv_heads * size, size)
        if not on(details.norms_if):
            query_norm = key_norm = 0
        return cls(
            vocab=found["vocab_size"],
            hidden=hidden,
            layers=found["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            mlp=hidden * (up + feed_forward) + on(details.mlp_bias) * (up + hidden),
            queries=2 * hidden * heads * size
            + on(details.qkv_bias) * heads * size
            + on(details.output_bias) * hidden
            + query_norm,
            keys_values=2 * kv_heads * size * (hidden + on(details.qkv_bias)) + key_norm,
            norms=norm * _norms(details, found),
            outside=norm + details.head_bias * found["vocab_size"],
            positions=hidden * found.get("n_positions", 0),
            tied=bool(found.get("tie_word_embeddings", False)),
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

    def _with(self, mlps: int) -> int:
        routed = (self.experts > 1) * self.experts + (self.attention_experts > 1) * self.attention_experts
        keys_values = self.keys_values * (1 if self.shared_kv else self.attention_experts)
        attention = self.queries * self.attention_experts + keys_values
        layer = mlps * self.mlp + attention + routed * self.hidden + self.norms
        return self.layers * layer + self.vocab * self.hidden * (1 if self.tied else 2) + self.positions + self.outside

    @property
    def parameters(self) -> int:
        return self._with(self.experts)

    @property
    def active_parameters(self) -> int:
        """Parameters that take part in one token: K of the E feed-forward experts, all attention experts."""
        return self._with(self.top_k)

    def forward_flops_per_token(self, sequence_length: int) -> int:
        """2 FLOPs per weight of every matrix product, plus causal attention's 2·S·H·d (half of all S² pairs)."""
        lookups = self.vocab * self.hidden * (0 if self.tied else 1) + self.positions  # weights that nothing multiplies
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


def _query_key_norms(details: Details, queries: int, keys: int, size: int) -> tuple[int, int]:
    if details.query_key_norms == "all":
        return queries, keys
    one = size * (2 if details.norm_bias else 1) if details.query_key_norms else 0
    return one, one


def _norms(details: Details, config: Mapping) -> int:
    """Norms in one layer; StableLM's parallel blocks have one."""
    parallel = config.get("model_type") == "stablelm" and config.get("use_parallel_residual", False)
    return 1 if parallel else details.norms
