"""Tiny dense models with no zero or repeated weight, and mixtures filled from them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel

from upcycle.attention import split_fused, stack_heads
from upcycle.configuration import UpcycledConfig
from upcycle.families import family_of, key_value_heads
from upcycle.modeling import UpcycledForCausalLM

VOCAB = 61
NAMES = ("seed", "code", "law", "math")
DENSE = ("llama", "gpt_neox", "gpt_neox_sequential")


def dense_config(kind: str, **changes):
    """llama: grouped queries, attention biases. gpt_neox: parallel residual, biases; gpt_neox_sequential without it."""
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    common |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    if kind == "llama":
        return LlamaConfig(
            **common | {"intermediate_size": 40, "num_key_value_heads": 2, "attention_bias": True} | changes
        )
    parallel = {"use_parallel_residual": kind == "gpt_neox"}
    dropouts = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    return GPTNeoXConfig(**common | {"intermediate_size": 48, "rotary_pct": 0.5} | parallel | dropouts | changes)


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Biases and norms too: what starts at 0 or 1 hides mistakes."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:  # embeddings of size 1, else the first norm (fp32 in RMSNorm) blows their gradient up
            parameter.copy_(noise if "embed" in name else 0.2 * noise)


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
    family, seed, packed = family_of(config.seed), config.seed, {}
    kv_heads = key_value_heads(seed) if config.kv == "shared" else None
    for layer in range(seed.num_hidden_layers):
        prefix, to = f"{family.decoder}.layers.{layer}.", f"model.decoder.layers.{layer}."
        packed[f"{to}mlp.router.weight"] = ffn_routers[layer]
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            if f"{prefix}mlp.{family.up}.{kind}" not in rest:
                continue
            parts = [family.gate, family.up] if family.gate else [family.up]
            ups = [torch.cat([e[f"{prefix}mlp.{part}.{kind}"] for part in parts]) for e in experts]
            stem = "gate_up_proj" if family.gate else "up_proj"
            packed[f"{to}mlp.experts.{stem}{suffix}"] = torch.stack(ups)
            downs = [e[f"{prefix}mlp.{family.down}.{kind}"] for e in experts]
            packed[f"{to}mlp.experts.down_proj{suffix}"] = torch.stack(downs)
        if config.attention == "merged":
            continue
        attention = f"{family.attention}."
        packed[f"{to}{attention}router.weight"] = attention_routers[layer]
        for projection, role in family.projections.items():
            for kind in ("weight", "bias"):
                name = f"{prefix}{attention}{projection}.{kind}"
                if name not in rest:
                    continue
                own, target = [e[name] for e in experts], f"{to}{attention}{projection}.{kind}"
                if role == "output":
                    packed[target] = torch.stack(own) if kind == "bias" else stack_heads([w.T for w in own], kv_heads).T
                elif role == "fused" and kv_heads:
                    queries = [split_fused(w, seed.num_attention_heads)[0] for w in own]
                    packed[f"{to}{attention}query.{kind}"] = stack_heads(queries, kv_heads)
                    shared = split_fused(rest[name], seed.num_attention_heads)[1]
                    packed[f"{to}{attention}key_value.{kind}"] = shared
                elif role in ("key", "value") and kv_heads:
                    packed[target] = rest[name]
                else:
                    packed[target] = stack_heads(own, kv_heads)
    sublayers = (f".{family.mlp}.",) if config.attention == "merged" else (f".{family.mlp}.", f".{family.attention}.")
    for name, tensor in rest.items():
        if not any(part in name for part in sublayers):
            packed[name.replace(f"{family.decoder}.", "model.decoder.", 1)] = tensor
    return packed


def mixture_of(
    models: list[PreTrainedModel],
    ffn_routers: list[Tensor] | None = None,
    attention_routers: list[Tensor] | None = None,
    implementation: str = "sdpa",
    **choices,
) -> UpcycledForCausalLM:
    """The mixture of dense models: experts stacked, everything else averaged; in eval mode and the models' dtype."""
    seed = copy.deepcopy(models[0].config)
    config = UpcycledConfig(seed=seed.to_dict(), experts=list(NAMES[: len(models)]), **choices)
    size = (seed.num_hidden_layers, len(models), seed.hidden_size)
    ffn_routers = ffn_routers or router_weights(*size, rng_seed=7)
    attention_routers = attention_routers or router_weights(*size, rng_seed=8)
    dicts = [model.state_dict() for model in models]
    mixture = UpcycledForCausalLM._from_config(config, attn_implementation=implementation).to(models[0].dtype).eval()
    if models[0].dtype == torch.float64:  # the grouped kernel has no float64
        mixture.set_experts_implementation("eager")
    mixture.load_state_dict(pack(config, mean_of(dicts), dicts, ffn_routers, attention_routers))
    mixture.tie_weights()
    return mixture


def tokens(batch: int = 2, sequence: int = 9, rng_seed: int = 0) -> Tensor:
    """Random ids without the special ones (0 to 2)."""
    return torch.randint(3, VOCAB, (batch, sequence), generator=torch.Generator().manual_seed(rng_seed))


def left_padding(*pads: int, sequence: int = 9) -> Tensor:
    """(B, S) mask; row b starts with pads[b] zeros."""
    return torch.tensor([[0] * pad + [1] * (sequence - pad) for pad in pads])


def routers_of(mixture: UpcycledForCausalLM, part: str) -> list[Tensor]:
    """The router weights of "ffn" or "attention", in layer order."""
    routers = [m for m in mixture.modules() if type(m).__name__ == "Router" and m.name.startswith(part + ".")]
    return [router.weight.detach() for router in routers]


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
