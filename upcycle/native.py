"""Which class of transformers computes what a mixture computes, and the mixture in that class's config and layout.

seed                    class (format)                  where they are equal
llama, mistral      ->  Mixtral (mixtral)               no biases, gates that sum to 1
qwen2, llama, ...   ->  Qwen2-MoE (qwen2_moe)           its shared expert gets zero weights
qwen3               ->  Qwen3-MoE (qwen3_moe)           one kind of attention in all layers
olmo2               ->  FlexOlmo (flex_olmo)
none                    OLMoE (olmoe)

The router's balance coefficient is carried over as `router_aux_loss_coef`. Differs: transformers adds that loss only with
`output_router_logits=True`, multiplies loads and probabilities after pooling all layers (two layers that collapse on
different experts look balanced), and its loads sum to K: its loss is K when routing is uniform, ours 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from upcycle.checkpoint import Checkpoint
from upcycle.configuration import UpcycledConfig

# Fields of the seed's config that every class below reads as the seed's own class does.
CARRIED = (
    "attention_dropout", "head_dim", "hidden_act", "hidden_size", "initializer_range", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "use_cache",
    "vocab_size",
)  # fmt: skip
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Qwen2-MoE must have a shared expert. Smaller widths load too, but loaders that cut it over ranks or quantise it in
# blocks of 32 weights need a multiple of theirs.
SHARED_EXPERT_SIZE = 32


@dataclass(frozen=True)
class Native:
    """A mixture-of-experts class of transformers.

    architecture: its name there. seeds: model types whose decoder layer is this one's but for the experts. router: the
    router's name below a layer. experts: names below a layer of expert {}'s gate, up and down projection, as
    save_pretrained writes them.
    """

    title: str
    architecture: str
    seeds: tuple[str, ...]
    router: str = "mlp.gate.weight"
    experts: tuple[str, ...] = tuple(f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down"))


FORMATS = {
    "mixtral": Native(
        "Mixtral",
        "MixtralForCausalLM",
        ("llama", "mistral"),
        "block_sparse_moe.gate.weight",
        tuple(f"block_sparse_moe.experts.{{}}.{part}.weight" for part in ("w1", "w3", "w2")),
    ),
    "qwen2_moe": Native("Qwen2-MoE", "Qwen2MoeForCausalLM", ("qwen2", "llama", "mistral")),
    "qwen3_moe": Native("Qwen3-MoE", "Qwen3MoeForCausalLM", ("qwen3",)),
    "flex_olmo": Native("FlexOlmo", "FlexOlmoForCausalLM", ("olmo2",)),
    "olmoe": Native("OLMoE", "OlmoeForCausalLM", ()),
}


def choose_format(config: UpcycledConfig, format: str) -> tuple[str, tuple[str, ...]]:
    """("auto" resolved, why the nearest native class was not taken).

    Raises ValueError: a native class was asked for that computes something else.
    """
    if format == "remote_code":
        return format, ()
    if format != "auto":
        if why := obstacles(config, format):
            raise ValueError(
                f"format={format!r}: the mixture is not a {FORMATS[format].title}: {'; '.join(why)}. "
                'Use format="remote_code", which keeps it as it is'
            )
        return format, ()
    candidates = [name for name, native in FORMATS.items() if config.seed.model_type in native.seeds]
    if equal := [name for name in candidates if not obstacles(config, name)]:
        return equal[0], ()
    if candidates:
        return "remote_code", tuple(obstacles(config, candidates[0]))
    titles = ", ".join(native.title for native in FORMATS.values())
    return "remote_code", (f"the seed is a {config.seed.model_type}, and none of {titles} has its decoder layer",)


def obstacles(config: UpcycledConfig, format: str) -> list[str]:
    """Why the mixture does not compute what `format`'s class does, one sentence each; empty if it does."""
    native, seed = FORMATS[format], config.seed
    if format == "olmoe":
        return [
            "OLMoE norms the inputs of its sublayers and, over all heads at once, queries and keys; no dense family "
            "here has that layer (OLMo-2 norms the outputs: its class is FlexOlmo)"
        ]
    if seed.model_type not in native.seeds:
        return [
            f"the seed is a {seed.model_type}, and {native.title} has the decoder layer of {' and '.join(native.seeds)}"
        ]
    found = []
    if config.attention != "merged":
        found.append(
            f"its attention is a soft mixture of {config.num_attention_experts} experts, and {native.title} has one attention a layer"
        )
    if getattr(seed, "attention_bias", False) and seed.model_type in ("llama", "mistral"):
        found.append(f"the seed has attention_bias=True, and {native.title} has no bias on the attention's output")
    if getattr(seed, "mlp_bias", False):
        found.append(f"the seed has mlp_bias=True, and the experts of {native.title} have no biases")
    found += _own_routing(config, native.title)
    if not config.gates_sum_to_one:
        if config.gate_scale != "none":
            found.append(
                f"gate_scale={config.gate_scale!r} multiplies the gates, and {native.title} has no such factor"
            )
        elif format == "mixtral":
            found.append("its gates are softmax_topk's bare probabilities, and Mixtral divides them by their sum")
    if format == "qwen3_moe" and len(set(seed.layer_types)) > 1:
        found.append("its layers differ in attention (sliding and full), and Qwen3-MoE has one kind for all layers")
    return found


def _own_routing(config: UpcycledConfig, title: str) -> list[str]:
    """What transformers' mixtures, which route every token of every layer by its own top K, have no word for."""
    options, found = config.router_options, []
    if config.router not in ("topk_softmax", "softmax_topk", "soft"):
        found.append(f"its router is {config.router}, and {title} takes the top K of a softmax")
    if config.merges_weights:
        found.append(f"its experts are merged in weight space, and {title} adds up their outputs")
    if options["per"] != "token":
        found.append(f"its router decides per {options['per']}, and {title}'s for every token")
    if options["bias_rate"]:
        found.append(f"its experts are selected with a bias, and {title} has none")
    if config.tie != "none":
        found.append(f"its routers are tied (tie={config.tie}), and those of {title} are not")
    if config.one_per_source:
        found.append(f"a token takes one expert of each source at most, and {title} has no such rule")
    if config.shared_expert != "none":
        found.append(
            f"every token takes a shared expert with a fixed share (shared_gate={config.shared_gate}), and {title} has no such expert"
        )
    if len(config.routed) < config.seed.num_hidden_layers:
        found.append(
            f"only its layers {', '.join(map(str, config.routed))} are mixtures, and all layers of {title} are"
        )
    return found


def notes(config: UpcycledConfig, format: str) -> tuple[str, ...]:
    """In what the native class is not the mixture although its logits are."""
    native, found = FORMATS[format], []
    found.append(
        f"The router of {native.title} computes in the model's dtype, the mixture's in fp32: below fp32, tokens between "
        "two experts may be routed otherwise"
    )
    if format == "qwen2_moe":
        found.append(
            f"Qwen2-MoE must have a shared expert; this one has width {SHARED_EXPERT_SIZE} and zero weights, adds exactly "
            "nothing, and gets no gradient"
        )
    if config.router == "softmax_topk" and config.gate_scale == "straight_through":
        found.append(
            "The gates of straight_through have the values of sum_to_one but another gradient; training on differs"
        )
    if config.balance != "none" and config.balance_coefficient:
        found.append(
            f"The mixture's balance coefficient {config.balance_coefficient} is router_aux_loss_coef, but transformers' balance loss pools all "
            f"layers and is {config.num_experts_per_tok} when routing is uniform, not 1; it is off until output_router_logits=True"
        )
    for name, full in config.loss_names("ffn").items():
        if name != "balance":
            found.append(
                f"The mixture's {full} loss ({config.losses('ffn')[f'{name}_coefficient']}) has no place in {native.title}"
            )
    options = config.router_options
    if options["noise_std"] or options["jitter"]:
        found.append(f"{native.title} trains without the noise on routers that the mixture trains with")
    if not options["trained"]:
        found.append(f"The mixture's routers are never trained; those of {native.title} train like everything else")
    return tuple(found)


def native_config(config: UpcycledConfig, format: str) -> PretrainedConfig:
    """The config of `format`'s class with the mixture's sizes and routers."""
    seed = config.seed
    fields = {name: getattr(seed, name) for name in CARRIED if hasattr(seed, name)}
    fields |= {name: getattr(config, name) for name in SPECIAL_TOKENS}
    fields |= {
        "tie_word_embeddings": config.tie_word_embeddings,
        "intermediate_size": seed.intermediate_size // config.split,
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": config.balance_coefficient if config.balance != "none" else 0.0,
        "num_local_experts" if format == "mixtral" else "num_experts": config.num_experts,
    }
    window, types = getattr(seed, "sliding_window", None), getattr(seed, "layer_types", None)
    if format == "mixtral":
        return AutoConfig.for_model(format, **fields, sliding_window=window)
    fields["norm_topk_prob"] = config.gates_sum_to_one
    if format == "flex_olmo":
        return AutoConfig.for_model(format, **fields, attention_bias=seed.attention_bias)
    fields["moe_intermediate_size"] = seed.intermediate_size // config.split
    if types is None:  # one kind of attention in all layers
        types = ["full_attention" if window is None else "sliding_attention"] * seed.num_hidden_layers
    sliding = "sliding_attention" in types
    fields |= {"use_sliding_window": sliding, "sliding_window": window if sliding else None}
    if format == "qwen3_moe":
        return AutoConfig.for_model(format, **fields, attention_bias=seed.attention_bias)
    shared = {"shared_expert_intermediate_size": SHARED_EXPERT_SIZE, "qkv_bias": seed.model_type == "qwen2"}
    return AutoConfig.for_model(format, **fields, **shared, layer_types=types)


def native_tensors(checkpoint: Checkpoint, config: UpcycledConfig, format: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in `format`'s own layout, one expert at a time; nothing is recomputed.

    Raises ValueError: a tensor that `format`'s class has no place for.
    """
    native = FORMATS[format]
    gate, up, down = native.experts
    for name in checkpoint.names:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        sublayer = re.fullmatch(r"model\.decoder\.(layers\.\d+)\.mlp\.(.+)", name)
        if sublayer is None:
            yield re.sub(r"^model\.decoder\.", "model.", name), checkpoint.get(name)
            continue
        layer, part = f"model.{sublayer[1]}.", sublayer[2]
        if part == "router.weight":
            yield layer + native.router, checkpoint.get(name)
            if format == "qwen2_moe":
                yield from _silent_shared_expert(f"{layer}mlp.", config.hidden_size, checkpoint.dtype())
        elif part == "experts.gate_up_proj":
            for expert, rows in enumerate(checkpoint.get(name)):
                for target, half in zip((gate, up), rows.chunk(2), strict=True):
                    yield layer + target.format(expert), half.clone()
        elif part == "experts.down_proj":
            for expert, rows in enumerate(checkpoint.get(name)):
                yield layer + down.format(expert), rows.clone()
        else:
            raise ValueError(
                f'{checkpoint.directory}: {native.title} has no place for {name}; use format="remote_code"'
            )


def _silent_shared_expert(block: str, hidden: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    width = SHARED_EXPERT_SIZE
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    for part, shape in shapes.items():
        yield f"{block}shared_expert.{part}.weight", torch.zeros(shape, dtype=dtype)
    yield f"{block}shared_expert_gate.weight", torch.zeros(1, hidden, dtype=dtype)
