"""Tiny dense models with no zero or repeated weight, and mixtures filled from them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel

from upcycle.configuration import UpcycledConfig
from upcycle.families import family_of
from upcycle.modeling import UpcycledForCausalLM
from upcycle.pieces import plan_pieces
from upcycle.routing import ROUTERS, Routing, Rule, Seen

VOCAB = 61
NAMES = ("seed", "code", "law", "math")
DENSE = ("llama", "gpt_neox", "gpt_neox_sequential")


COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
GROUPED = {"intermediate_size": 40, "num_key_value_heads": 2}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
SCALED = {"scale_attn_weights": True, "n_inner": 48}
NO_DROPOUT = dict.fromkeys(("attention_dropout", "hidden_dropout"), 0.0)

# Every family with whatever it has: biases, norms of queries and keys, windows, partial and scaled rotary embeddings,
# multipliers, soft caps, tied embeddings.
FAMILY_CONFIGS: dict[str, dict] = {
    "llama": GROUPED
    | {"attention_bias": True, "mlp_bias": True}
    | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "mistral": GROUPED | {"sliding_window": 4, "head_dim": 12},
    "qwen2": GROUPED | SLIDING | {"use_sliding_window": True, "max_window_layers": 0, "tie_word_embeddings": True},
    "qwen3": GROUPED | {"head_dim": 16, "attention_bias": True},
    "olmo2": GROUPED,
    "olmo3": GROUPED | SLIDING,
    "cohere": GROUPED | {"use_qk_norm": True, "logit_scale": 0.25, "tie_word_embeddings": True},
    "cohere2": GROUPED | SLIDING | {"logit_scale": 0.25, "tie_word_embeddings": True},
    "granite": GROUPED
    | {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    "smollm3": GROUPED | {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "gemma2": GROUPED
    | SLIDING
    | {"head_dim": 16, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
    | {"tie_word_embeddings": True},
    "gemma3_text": GROUPED | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 20, "tie_word_embeddings": True},
    "stablelm": GROUPED | {"qk_layernorm": True, "use_qkv_bias": True} | NO_DROPOUT,
    "glm4": GROUPED | {"head_dim": 8, "attention_bias": True},
    "phi": GROUPED | {"qk_layernorm": True},
    "seed_oss": GROUPED | {"attention_bias": True, "residual_dropout": 0.0, "attention_dropout": 0.0, "head_dim": 8},
    "phi3": GROUPED | {"sliding_window": 4},
    "nemotron": GROUPED | {"mlp_bias": True, "attention_bias": True, "head_dim": 8},
    "starcoder2": GROUPED | {"use_bias": True, "sliding_window": 4},
    "gpt_neox": {"intermediate_size": 48, "rotary_pct": 0.5} | NO_DROPOUT,
    "gpt2": SCALED | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


def dense_config(kind: str, **changes):
    """llama: grouped queries, attention biases. gpt_neox: parallel residual, biases; gpt_neox_sequential without it.

    `family/<model type>` is that family's entry of FAMILY_CONFIGS.
    """
    if kind.startswith("family/"):
        kind = kind.removeprefix("family/")
        return AutoConfig.for_model(kind, **COMMON | FAMILY_CONFIGS[kind] | changes)
    if kind == "llama":
        return LlamaConfig(**COMMON | GROUPED | {"attention_bias": True} | changes)
    parallel = {"use_parallel_residual": kind == "gpt_neox"}
    return GPTNeoXConfig(**COMMON | FAMILY_CONFIGS["gpt_neox"] | parallel | changes)


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Biases and norms too: what starts at 0 or 1 hides mistakes."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:  # embeddings of size 1, else the first norm (fp32 in RMSNorm) blows their gradient up
            size = 0.2 if tied else 1.0  # tied ones are the head too
            parameter.copy_(size * noise if "embed" in name else 0.2 * noise)


def dense_models(kind: str, count: int = 3, rng_seed: int = 0, dtype=torch.float64, **changes) -> list[PreTrainedModel]:
    models = []
    for index in range(count):
        model = AutoModelForCausalLM.from_config(dense_config(kind, **changes)).to(dtype).eval()
        randomise(model, torch.Generator().manual_seed(1000 * rng_seed + index))
        models.append(model)
    return models


def router_weights(layers: int, experts: int, hidden: int, rng_seed: int = 7, std: float = 0.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rng_seed)
    return [std * torch.randn(experts, hidden, generator=generator, dtype=torch.float64) for _ in range(layers)]


def mean_of(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([d[name] for d in dicts]).mean(0) for name in dicts[0]}


def pack(
    config: UpcycledConfig,
    rest: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    ffn_routers: list[Tensor],
    attention_routers: list[Tensor],
) -> dict[str, Tensor]:
    """The mixture's state dict: `experts` where it holds a copy for each expert, `rest` elsewhere.

    It only moves numbers, so it carries gradients from the dense models to the mixture as well as weights.
    """
    attention, packed, routers = (
        family_of(config.seed).attention,
        {},
        {True: iter(attention_routers), False: iter(ffn_routers)},
    )
    names = [name for name in rest if not (name == "lm_head.weight" and config.tie_word_embeddings)]
    for piece in plan_pieces(config, names):
        if piece.origin == "fresh" and piece.target.endswith(".bias"):
            packed[piece.target] = torch.zeros(config.num_experts)
        elif piece.origin == "fresh":
            packed[piece.target] = next(routers[f".{attention}." in piece.target])
        elif piece.origin == "merged":
            packed[piece.target] = piece.cut(rest[piece.sources[0]])
        elif piece.origin == "copied":
            own = config.experts.index(piece.model) if piece.expert is None else piece.expert
            packed[piece.target] = experts[own][piece.sources[0]]
        else:
            packed[piece.target] = piece.stack([[piece.cut(one[name]) for name in piece.sources] for one in experts])
    return packed


def mixture_of(
    models: list[PreTrainedModel],
    ffn_routers: list[Tensor] | None = None,
    attention_routers: list[Tensor] | None = None,
    implementation: str | None = "sdpa",
    **choices,
) -> UpcycledForCausalLM:
    """The mixture of dense models: experts stacked, everything else averaged; in eval mode and the models' dtype."""
    seed = copy.deepcopy(models[0].config)
    config = UpcycledConfig(seed=seed.to_dict(), experts=list(NAMES[: len(models)]), **choices)
    size = (len(config.routed), len(models), seed.hidden_size)
    ffn_routers = ffn_routers or router_weights(*size, rng_seed=7)
    attention_routers = attention_routers or router_weights(*size, rng_seed=8)
    dicts = [model.state_dict() for model in models]
    mixture = UpcycledForCausalLM._from_config(config, attn_implementation=implementation).to(models[0].dtype).eval()
    if models[0].dtype == torch.float64:  # the grouped kernel has no float64
        mixture.set_experts_implementation("eager")
    packed = pack(config, mean_of(dicts), dicts, ffn_routers, attention_routers)
    missing, unexpected = mixture.load_state_dict(packed, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    mixture.tie_weights()
    return mixture


@torch.no_grad()
def told_by(model, embedding: str, values) -> torch.nn.Module:
    """A model in which routers see one number of each token, in coordinate 0: `values` of the rows of an embedding.

    Its sublayers add nothing; a positive number is expert 0's, a negative one expert 1's, in all layers.
    """
    for name, parameter in model.named_parameters():
        parameter.zero_()
        if "norm" in name or ".ln_" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        if name.endswith("router.weight"):
            parameter[0, 0], parameter[1, 0] = 50.0, -50.0
        if name.endswith(embedding):
            parameter[:, 0] = torch.as_tensor(values, dtype=parameter.dtype)
            parameter[:, 1] = 1.0  # norms need a second number
    return model


def route(kind: str, logits_TE: Tensor, top_k: int = 1, gate_scale: str = "none", **rule) -> Routing:
    """What a router of the table makes of one sequence's logits, in evaluation."""
    return ROUTERS[kind](logits_TE, Rule(kind, top_k, gate_scale, **rule), Seen((1, len(logits_TE))))


def tokens(batch: int = 2, sequence: int = 9, rng_seed: int = 0) -> Tensor:
    """Random ids without the special ones (0 to 2)."""
    return torch.randint(3, VOCAB, (batch, sequence), generator=torch.Generator().manual_seed(rng_seed))


def left_padding(*pads: int, sequence: int = 9) -> Tensor:
    """(B, S) mask; row b starts with pads[b] zeros."""
    return torch.tensor([[0] * pad + [1] * (sequence - pad) for pad in pads])


def routers_of(mixture: UpcycledForCausalLM, part: str) -> list[Tensor]:
    """The router weights of "ffn" or "attention", in layer order; tied and parameter-free routers have none."""
    routers = [m for m in mixture.modules() if type(m).__name__ == "Router" and m.name.startswith(part + ".")]
    return [router.weight.detach() for router in routers if router.weight is not None]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name; zeros where nothing arrived."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def reference_gradients(reference, config: UpcycledConfig) -> dict[str, Tensor]:
    """The gradients of a `reference.ReferenceMixture`, by the names of the mixture's parameters."""

    def of(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]

    rest, experts = gradients_of(reference.rest), [gradients_of(model) for model in reference.experts]
    return pack(config, rest, experts, of(reference.ffn_routers), of(reference.attention_routers))


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerances) -> None:
    """Equal names and, compared in fp32, close tensors: routers, rotary embeddings and RMSNorm compute in fp32."""
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor.float(), theirs[name].float(), msg=lambda text, name=name: f"{name}: {text}", **tolerances
        )


def aligned(model: nn.Module) -> Any:
    """The model with its weights in memory of its own: files are mapped at any address, and kernels sum in an order that depends on it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def assert_same_logits(found: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the largest: norms, rotary embeddings and routers compute in fp32 in any model, and kernels round
    differently by shape and machine. Where padding is seen, logits are off by as much as they are large."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
