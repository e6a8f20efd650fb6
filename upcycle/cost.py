"""What a model costs, from its sizes alone: parameters, active parameters, FLOPs per token, bytes. No torch.

Shapes: V vocabulary, D hidden, d head size, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from upcycle.combine_config import Combined
from upcycle.experts import Matched, Placed, place, routed_layers
from upcycle.kinds import COMBINE, FACTS
from upcycle.kronecker import OF_A_MERGE, map_flops, map_parameters, map_shapes
from upcycle.mixture_config import AssembleConfig

FINEST = 16  # granularity up to which a match is looked for
CLOSE = 0.01  # a match is within this share of both figures


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
    """The sizes that decide what a decoder costs. `mixtures = 0` is a dense model.

    Parameters of one layer: `mlp`, of a whole feed-forward of `width` hidden units, `down_bias` of which every shard has;
    `queries`, all that every attention expert has, and `keys_values`, which experts may share; `norms`. Of the model:
    `positions`, learned ones; `outside`, all but those, layers, embedding and head.
    Of a mixture: in `mixtures` layers `experts` shards of mlp/split, of which a token takes top_k, but all in `soft_layers`
    of them; `shared`, a whole feed-forward beside them. router_rows: of all routers together. combine: where weights are merged.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    width: int
    down_bias: int
    queries: int
    keys_values: int
    norms: int
    outside: int
    positions: int = 0
    tied: bool = False
    mixtures: int = 0
    experts: int = 1
    top_k: int = 1
    split: int = 1
    shared: bool = False
    attention_experts: int = 1
    shared_kv: bool = False
    router_rows: int = 0
    soft_layers: int = 0
    gated: bool = True
    combine: Combined | None = None

    @classmethod
    def of_config(cls, config: Mapping) -> Shape:
        """From the fields of a config.json, dense or ours. A family without DETAILS is counted like Llama."""
        if config.get("model_type") == "upcycled":
            return _saved_mixture(cls.of_config(config["seed"]), config)
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
            width=feed_forward,
            down_bias=on(details.mlp_bias) * hidden,
            queries=2 * hidden * heads * size
            + on(details.qkv_bias) * heads * size
            + on(details.output_bias) * hidden
            + query_norm,
            keys_values=2 * kv_heads * size * (hidden + on(details.qkv_bias)) + key_norm,
            norms=norm * _norms(details, found),
            outside=norm + details.head_bias * found["vocab_size"],
            positions=hidden * found.get("n_positions", 0),
            tied=bool(found.get("tie_word_embeddings", False)),
            gated=details.gated,
        )

    def assembled(self, choice: AssembleConfig, branches: Sequence[str]) -> Shape:
        """The mixture that `choice` makes of this dense model and its branches. Raises ValueError: see `placed`."""
        found = placed(self, choice, branches)
        experts, attention = len(found.experts), len(found.attention)
        kinds = {"ffn": (choice.router.form, experts)}
        kinds |= {"attention": (choice.attention_router.form, attention)} if attention else {}
        mixtures = self.layers if found.layers is None else len(found.layers)
        return replace(
            self,
            mixtures=mixtures,
            experts=experts,
            top_k=experts if choice.router.facts.every else 1 if choice.router.facts.one else found.top_k,
            split=found.split,
            shared=choice.placement.shared_expert != "none",
            attention_experts=attention or 1,
            shared_kv=choice.attention == "mixture" and choice.kv == "shared",
            router_rows=_router_rows(kinds, choice.tie, mixtures),
            soft_layers=int(choice.router.kind == "sample_top1"),
            combine=Combined.of(asdict(choice.combine), asdict(choice.router.pool), mixtures),
        )._checked()

    def _checked(self) -> Shape:
        """Raises ValueError: a curvature that the sizes do not allow."""
        self._maps()
        return self

    def _maps(self) -> list[tuple[dict[str, tuple[int, ...]], int, int]]:
        """(shapes of a layer's curvature, rows, columns) of the matrices up (with the gate) and down."""
        if self.combine is None:
            return []
        kind, rank = self.combine.curvature, self.combine.rank
        sides = ((2 if self.gated else 1, self.width, self.hidden), (1, self.hidden, self.width))
        return [(map_shapes(kind, rank, self.experts, *side), *side[1:]) for side in sides]

    @property
    def _shard(self) -> int:
        return (self.mlp - self.down_bias) // self.split + self.down_bias

    def _with(self, mlps: int) -> int:
        keys_values = self.keys_values * (1 if self.shared_kv else self.attention_experts)
        mixture = mlps * self._shard + self.shared * self.mlp + self.queries * self.attention_experts + keys_values
        dense = self.mlp + self.queries + self.keys_values
        layers = self.mixtures * mixture + (self.layers - self.mixtures) * dense + self.layers * self.norms
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return layers + self.router_rows * self.hidden + embeddings + self.positions + self.outside

    def _in_all_layers(self, of_experts: int) -> int:
        """So much for each attention: `of_experts` in a mixture's layer, 1 in the others."""
        return self.mixtures * of_experts + self.layers - self.mixtures

    @property
    def parameters(self) -> int:
        beside = 0
        if self.combine is not None:
            beside = self.combine.bases * self.mlp + self.combine.maps * sum(
                map_parameters(one) for one, *_ in self._maps()
            )
        return self._with(self.experts) + beside

    @property
    def active_parameters(self) -> int:
        """Parameters that take part in one token: K of the E feed-forward experts, all attention experts. Where weights are merged, those
        that a token is multiplied with: one merged feed-forward."""
        if self.combine is not None:
            return self._with(1)
        return self._with(self.top_k) + self.soft_layers * (self.experts - self.top_k) * self._shard

    def forward_flops_per_token(self, sequence_length: int) -> int:
        """2 FLOPs per weight of every matrix product, plus causal attention's 2·S·H·d (half of all S² pairs)."""
        lookups = self.vocab * self.hidden * (0 if self.tied else 1) + self.positions  # weights that nothing multiplies
        attention = 2 * sequence_length * self.heads * self.head_size * self._in_all_layers(self.attention_experts)
        return 2 * (self.active_parameters - lookups) + attention + self._merging_flops(sequence_length)

    def _merging_flops(self, sequence_length: int) -> int:
        """Of merging, per token: one pass over all experts' weights for each decision."""
        if self.combine is None:
            return 0
        each = 2 * self.experts * self.mlp * self.mixtures
        if self.combine.update == "previous_merged":  # a base of each decision, and so the curvature on it
            each += (self.mixtures - 1) * sum(map_flops(*one) for one in self._maps())
        return each * self.combine.decisions(sequence_length) // sequence_length

    @property
    def fixed_flops(self) -> int:
        """Of a forward, however many tokens it has: the curvature applied to all experts."""
        if self.combine is None:
            return 0
        layers = {"previous_merged": 1, "per_layer": 2 * self.mixtures}.get(self.combine.update, self.mixtures)
        return layers * sum(map_flops(*one) for one in self._maps())

    def map_flops(self, models: int, rank: int, roles: Collection[str]) -> int:
        """Of a Kronecker map on every matrix of these roles of so many dense models (a CAMEx merge's): rows and columns, of embeddings columns
        alone. Raises ValueError: see `kronecker.factor_pair`."""
        inner, outer, kv = self.heads * self.head_size, self.hidden, self.kv_heads * self.head_size
        of_role = {
            "attention": [(inner, outer), (outer, inner), (kv, outer), (kv, outer)],
            "mlp": [(outer, self.width), *[(self.width, outer)] * (2 if self.gated else 1)],
        }
        matrices = [sides for role, own in of_role.items() if role in roles for sides in own]
        maps = [(map_shapes("kronecker", rank, models, 1, *sides, OF_A_MERGE), sides) for sides in matrices]
        each = sum(map_flops(shapes, *sides) for shapes, sides in maps)
        tables = ("embedding" in roles) + ("head" in roles and not self.tied)
        columns = map_shapes("kronecker", rank, models, 1, 1, outer, OF_A_MERGE) if tables else {}
        table = map_flops({name: one for name, one in columns.items() if name in ("in1", "in2")}, self.vocab, outer)
        return self.layers * each + tables * table

    def train_flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward: three times the forward; merged weights are merged once more in backward."""
        return 3 * self.forward_flops_per_token(sequence_length) + self._merging_flops(sequence_length)

    def step_flops_per_token(self, sequence_length: int, sequences: int) -> float:
        """The same with what a forward costs once, however many tokens it has. sequences: of a forward, a micro-batch."""
        return self.train_flops_per_token(sequence_length) + 3 * self.fixed_flops / (sequences * sequence_length)

    @property
    def train_bytes(self) -> int:
        """Weights, gradients and AdamW's two moments, all fp32 (bf16 is autocast's), without activations."""
        return self.parameters * 16

    def cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        heads = self.kv_heads * self._in_all_layers(1 if self.shared_kv else self.attention_experts)
        return 2 * heads * self.head_size * bytes_per_value


def _saved_mixture(dense: Shape, config: Mapping) -> Shape:
    """From config.json of a mixture (configuration.py)."""
    soft, experts = config["attention"] == "mixture", len(config["experts"])
    attention = len(config["attention_experts"] or config["experts"]) if soft else 1
    kinds = {"ffn": (config["router"], experts)}
    kinds |= {"attention": (config["attention_router"]["kind"], attention)} if soft else {}
    mixtures = dense.layers if config["routed_layers"] is None else len(config["routed_layers"])
    return replace(
        dense,
        mixtures=mixtures,
        experts=experts,
        top_k=config["num_experts_per_tok"],
        split=config["split"],
        shared=config["shared_expert"] != "none",
        attention_experts=attention,
        shared_kv=soft and config["kv"] == "shared",
        router_rows=_router_rows(kinds, config["tie"], mixtures),
        soft_layers=int(config["router"] == "sample_top1"),  # UpcycledConfig.rule
        combine=Combined.of(config.get("combine") or COMBINE, config["router_options"], mixtures),
    )


def _router_rows(kinds: Mapping[str, tuple[str, int]], tie: str, layers: int) -> int:
    """Rows of all routers; kinds: of each part, its kind of router and its experts. Those that follow others have none."""
    rows = 0
    for part, (kind, experts) in kinds.items():
        if not FACTS[kind].weightless and not (tie == "sublayers" and part == "ffn"):
            rows += experts * (1 if tie == "layers" else layers)
    return rows


def placed(seed: Shape, choice: AssembleConfig, branches: Sequence[str]) -> Placed:
    """The experts that `choice` makes of a seed of this shape and its branches.

    Raises ValueError: see `experts.place`; nothing matches (`matched`).
    """
    found = matched(seed, choice, branches) if choice.placement.match != "none" else None
    return place(choice, branches, seed.layers, seed.width, found)


def matched(seed: Shape, choice: AssembleConfig, branches: Sequence[str]) -> Matched:
    """The coarsest split G, the number of shards S and the top_k K that make BTX as large as BAM of the same sources:

        total(G, S) = total of BAM,    active(G, S, K) = active of BAM,    each within 1 %

    BAM has attention experts with keys and values of their own, and one feed-forward expert a token (arXiv:2408.08274: "BTX
    with equal total and active parameters" has 6 experts and top-3 against BAM of 4; there G = 1).
    Raises ValueError: no G up to 16 that divides the width comes so close; the error names the nearest.
    """
    count, mixtures = len(branches) + choice.include_seed, seed.layers
    if layers := routed_layers(choice.placement.layers, seed.layers):
        mixtures = len(layers)
    shared = choice.placement.shared_expert != "none"
    rows = _router_rows({"ffn": ("topk_softmax", count), "attention": ("soft", count)}, choice.tie, mixtures)
    start = replace(seed, mixtures=mixtures, experts=count, shared=shared)
    bam = replace(start, attention_experts=count, router_rows=rows)
    tried: list[tuple[float, Shape]] = []
    for split in (split for split in range(1, FINEST + 1) if seed.width % split == 0):
        found = _fit(start, bam, split, choice.tie)
        tried.append((_off(found, bam), found))
        if tried[-1][0] <= CLOSE:
            return Matched(split, found.experts, found.top_k, _matching(found, bam))
    _, nearest = min(tried, key=lambda one: one[0])
    raise ValueError(
        f"placement.match={choice.placement.match}: no split up to {FINEST} of the {seed.width} hidden units comes within "
        f"{CLOSE:.0%} of BAM in total and in active parameters; the nearest is {_matching(nearest, bam)}; take a seed with "
        "another intermediate size, or more layers"
    )


def _fit(start: Shape, bam: Shape, split: int, tie: str) -> Shape:
    """As many shards, and of them as many a token, as come closest to BAM's parameters; both counts are linear."""

    def of(shards: int, top_k: int) -> Shape:
        rows = _router_rows({"ffn": ("topk_softmax", shards)}, tie, start.mixtures)
        return replace(start, split=split, experts=shards, top_k=top_k, router_rows=rows)

    least = start.experts * split
    a_shard = of(least + 1, 1).parameters - of(least, 1).parameters
    shards = least + round((bam.parameters - of(least, 1).parameters) / a_shard)
    a_place = of(shards, 2).active_parameters - of(shards, 1).active_parameters
    top_k = 1 + round((bam.active_parameters - of(shards, 1).active_parameters) / a_place)
    near = [of(shards + more, top_k + less) for more in (0, -1, 1) for less in (0, -1, 1)]
    # Two shards a token at least: the gate of one would be the constant 1, and teach the router nothing.
    fitting = [one for one in near if least <= one.experts and 2 <= one.top_k <= one.experts]
    return min(fitting or [of(max(shards, least), 2)], key=lambda one: _off(one, bam))


def _off(found: Shape, wanted: Shape) -> float:
    """The larger of the two differences, as a share."""
    total = abs(found.parameters / wanted.parameters - 1)
    return max(total, abs(found.active_parameters / wanted.active_parameters - 1))


def _matching(found: Shape, bam: Shape) -> str:
    figures = [
        f"{ours:,} {name}, BAM's {theirs:,} ({ours / theirs - 1:+.2%})"
        for name, ours, theirs in (
            ("parameters", found.parameters, bam.parameters),
            ("active", found.active_parameters, bam.active_parameters),
        )
    ]
    return f"split {found.split}, {found.experts} shards, {found.top_k} a token: {'; '.join(figures)}"


def _query_key_norms(details: Details, queries: int, keys: int, size: int) -> tuple[int, int]:
    if details.query_key_norms == "all":
        return queries, keys
    one = size * (2 if details.norm_bias else 1) if details.query_key_norms else 0
    return one, one


def _norms(details: Details, config: Mapping) -> int:
    """Norms in one layer; StableLM's parallel blocks have one."""
    parallel = config.get("model_type") == "stablelm" and config.get("use_parallel_residual", False)
    return 1 if parallel else details.norms
