"""cost.py's figures against the real modules."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests.tiny import FAMILY_CONFIGS, dense_config
from upcycle.configuration import UpcycledConfig
from upcycle.cost import Shape
from upcycle.mixture_config import AssembleConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.router import RoutingTrace
from upcycle.router_config import RouterConfig
from upcycle.routing import ROUTERS

MIXTURES = [("merged", "expert"), ("mixture", "expert"), ("mixture", "shared")]


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip
FAMILIES = [f"family/{kind}" for kind in FAMILY_CONFIGS]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_dense_parameters_are_exact(kind, tied):
    config = dense_config(kind, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = Shape.of_config(config.to_dict())
    assert shape.parameters == shape.active_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_config_that_leaves_defaults_out_counts_the_same(kind):
    upstream = (
        {"head_dim": 128, "num_key_value_heads": 8} if kind == "family/nemotron" else {}
    )  # its own default does not build
    config = type(dense_config(kind))(vocab_size=61, num_hidden_layers=2, pad_token_id=None, **upstream)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    named = {name: getattr(config, name) for name in SIZES if getattr(config, name, None) is not None}
    shape = Shape.of_config({"model_type": config.model_type} | named)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("attention", "kv"), MIXTURES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_mixture_parameters_are_exact(kind, attention, kv):
    seed = dense_config(kind)
    config = UpcycledConfig(seed=seed.to_dict(), experts=["seed", "a", "b"], attention=attention, kv=kv)
    with torch.device("meta"):
        model = UpcycledForCausalLM._from_config(config)
    shape = Shape.of_config(config.to_dict())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    per_expert = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n) // 3
    assert shape.active_parameters == shape.parameters - (3 - config.num_experts_per_tok) * per_expert


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_active_parameters_are_those_of_the_experts_that_tokens_take(kind):
    """As many places as each layer's router gives a token; a router without weights has none to count."""
    seed, options = dense_config("llama"), {"num_experts_per_tok": 2}
    config = UpcycledConfig(seed=seed.to_dict(), experts=["seed", "a", "b"], router=kind, **options)
    model = UpcycledForCausalLM._from_config(config).eval()
    trace = RoutingTrace(expert_B=torch.zeros(1, dtype=torch.long))
    model(torch.ones(1, 4, dtype=torch.long), trace=trace)
    one = sum(p[0].numel() for n, p in model.named_parameters() if ".layers.0." in n and ".experts." in n)
    idle = sum(3 - routing.experts.shape[1] for routing in trace.of("ffn"))
    shape, choice = Shape.of_config(config.to_dict()), "top_k" if "softmax" in kind else kind
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.active_parameters == shape.parameters - idle * one
    router = RouterConfig(kind=choice, top_k=2 if choice in ("top_k", "expert_choice") else 1)
    assert Shape.of_config(seed.to_dict()).assembled(AssembleConfig(router=router), ["a", "b"]) == shape


def test_settings_and_saved_config_give_one_shape():
    seed = dense_config("llama")
    choice = AssembleConfig(router=RouterConfig(top_k=2), attention="mixture", kv="shared")
    config = UpcycledConfig(seed=seed.to_dict(), experts=["a", "b", "c"], attention="mixture", kv="shared")
    assert Shape.of_config(seed.to_dict()).assembled(choice, ["b", "c"]) == Shape.of_config(config.to_dict())


@pytest.mark.parametrize("attention", ["merged", "mixture"])
def test_forward_flops_agree_with_a_counter(attention):
    """The counter sees all S² attention pairs, twice what a causal kernel needs; the rest must agree within 1 %."""
    seed = dense_config("llama", attention_bias=False)
    config = UpcycledConfig(seed=seed.to_dict(), experts=["a", "b"], num_experts_per_tok=2, attention=attention)
    model, length = UpcycledForCausalLM._from_config(config, attn_implementation="eager"), 32
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None])
    shape = Shape.of_config(config.to_dict())
    pairs = 2 * length * shape.heads * shape.head_size * shape.attention_experts * shape.layers * length
    assert counter.get_total_flops() == pytest.approx(shape.forward_flops_per_token(length) * length + pairs, rel=0.01)
    assert shape.train_flops_per_token(length) == 3 * shape.forward_flops_per_token(length)


def test_cache_bytes_are_what_generation_holds():
    for kv, heads in (("shared", 1), ("expert", 3)):
        seed = dense_config("llama")
        config = UpcycledConfig(seed=seed.to_dict(), experts=["a", "b", "c"], attention="mixture", kv=kv)
        model = UpcycledForCausalLM._from_config(config)
        cache = model(torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
        measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 5
        assert Shape.of_config(config.to_dict()).cache_bytes_per_token(4) == measured
        assert cache.layers[0].keys.shape[1] == heads * seed.num_key_value_heads
