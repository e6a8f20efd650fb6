"""Settings of routers that mean nothing, or not what they say, are refused with the reason: in a config and in a model."""

from __future__ import annotations

import pytest
import tiny

from upcycle.config import TrainConfig
from upcycle.configuration import UpcycledConfig
from upcycle.mixture_config import AssembleConfig, MixtureConfig
from upcycle.router_config import InitConfig, LossesConfig, NoiseConfig, PoolConfig, RouterConfig

TOP1 = {"top_k": 1, "gate_order": "softmax_topk"}
SOFT = {"kind": "soft", "top_k": 1}
SEGMENTS = PoolConfig(per="segment", tokens=32)

ROUTER = {
    "capacity_factor=2.0 has no effect: kind=top_k has no capacity; switch has; leave capacity_factor=1.5": {
        "capacity_factor": 2.0
    },
    "trained=false has no effect: kind=hash has no weights": {"kind": "hash", "top_k": 1, "trained": False},
    "pool.tokens=32 has no effect: pool.per=token decides": {"pool": PoolConfig(tokens=32)},
    "pool.first=uniform has no effect: pool.per=token": SOFT | {"pool": PoolConfig(first="uniform")},
    "noise.std=0.1 has no effect: kind=uniform has no weights": {
        "kind": "uniform",
        "top_k": 1,
        "noise": NoiseConfig(std=0.1),
    },
    "noise.jitter=0.1 has no effect: kind=oracle has no weights": {
        "kind": "oracle",
        "top_k": 1,
        "noise": NoiseConfig(jitter=0.1),
    },
    "init.kind=zeros has no effect: kind=hash has no weights": {
        "kind": "hash",
        "top_k": 1,
        "init": InitConfig(kind="zeros"),
    },
    "init.std=0.1 has no effect: init.kind=zeros draws nothing": {"init": InitConfig(kind="zeros", std=0.1)},
    "init.tokens=5 has no effect: init.kind=normal reads no training text": {"init": InitConfig(tokens=5)},
    "init.kind=zeros with kind=expert_choice": {"kind": "expert_choice", "init": InitConfig(kind="zeros")},
    "losses.balance_coefficient=0.1 has no effect with losses.balance=none": {
        "losses": LossesConfig(balance_coefficient=0.1)
    },
    "losses.balance=switch is constant with kind=soft": SOFT
    | {"losses": LossesConfig(balance="switch", balance_coefficient=0.1)},
    r"losses \(z\) have no effect on a router with kind=hash": {
        "kind": "hash",
        "top_k": 1,
        "losses": LossesConfig(z_coefficient=0.1),
    },
    r"losses \(entropy\) have no effect .* its weights are never trained": {
        "trained": False,
        "losses": LossesConfig(entropy_coefficient=-0.1),
    },
    "balanced by construction": {
        "kind": "expert_choice",
        "losses": LossesConfig(balance="btx", balance_coefficient=0.1, z_coefficient=0.1),
    },
    "bias_rate=0.1 needs kind=top_k and trained=true": SOFT | {"bias_rate": 0.1},
    "pool.per=segment needs kind=top_k or soft": {"kind": "switch", "top_k": 1, "pool": SEGMENTS},
    "pool.first=uniform needs kind=soft": {"pool": PoolConfig(per="segment", first="uniform")},
    "noise of single tokens averages out": {"pool": SEGMENTS, "noise": NoiseConfig(std=0.1)},
    "top_k=1 with gate_order=topk_softmax": {"top_k": 1},
    "gate_scale=compensate needs gate_order=softmax_topk": {"gate_scale": "compensate"},
    "gate_scale=compensate has no effect with kind=soft": SOFT | {"gate_scale": "compensate"},
    "gate_scale=straight_through is not defined for kind=expert_choice": {
        "kind": "expert_choice",
        "gate_scale": "straight_through",
    },
}


@pytest.mark.parametrize("message", ROUTER)
def test_a_router_says_what_of_it_means_nothing(message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**ROUTER[message])


def of(kind: str, **fields) -> RouterConfig:
    return RouterConfig(kind=kind, top_k=1, **fields)


HASH, SAMPLE = of("hash"), of("sample_top1", gate_scale="straight_through")
BAM = {"attention": "mixture"}
SIMILAR = LossesConfig(similarity_coefficient=0.1)
ASSEMBLE = {
    "kv=shared has no effect with attention=merged": {"kv": "shared"},
    "attention_router has no effect with attention=merged": {"attention_router": RouterConfig()},
    "attention_router.kind=switch: an attention expert attends": BAM | {"attention_router": of("switch")},
    "tie=sublayers has no effect with attention=merged": {"tie": "sublayers"},
    "tie=layers has no effect on router.kind=hash": {"tie": "layers", "router": HASH},
    "tie=skip has no effect on router.kind=uniform": {"tie": "skip", "router": of("uniform")},
    "tie=sublayers ties logits, and attention_router.kind=uniform has none": BAM
    | {"tie": "sublayers", "attention_router": of("uniform")},
    "tie=sublayers ties logits, and router.kind=hash has none": BAM | {"tie": "sublayers", "router": HASH},
    "router.trained=false has no effect with tie=sublayers": BAM
    | {"tie": "sublayers", "router": RouterConfig(trained=False)},
    "router.noise.std=0.1 has no effect with tie=sublayers": BAM
    | {"tie": "sublayers", "router": RouterConfig(noise=NoiseConfig(std=0.1))},
    "router.init.kind=zeros has no effect with tie=sublayers": BAM
    | {"tie": "sublayers", "router": RouterConfig(init=InitConfig(kind="zeros"))},
    "tie=skip ties logits of single tokens, and router.pool.per=segment": {
        "tie": "skip",
        "router": RouterConfig(pool=SEGMENTS),
    },
    "tie=layers with router.kind=sample_top1": {"tie": "layers", "router": SAMPLE},
    "tie=layers with attention_router.kind=sample_top1": BAM | {"tie": "layers", "attention_router": SAMPLE},
    "router.losses.similarity_coefficient=0.1 has no effect with tie=layers": {
        "tie": "layers",
        "router": RouterConfig(losses=SIMILAR),
    },
    "router.pool.first=seed needs the seed among the experts": {
        "include_seed": False,
        "router": RouterConfig(pool=SEGMENTS),
    },
}


@pytest.mark.parametrize("message", ASSEMBLE)
def test_a_mixture_says_what_of_it_means_nothing(message):
    with pytest.raises(ValueError, match=message):
        AssembleConfig(**ASSEMBLE[message])


def test_a_tie_with_one_fixed_router_still_ties_the_other():
    mixed = AssembleConfig(attention="mixture", tie="layers", attention_router=of("uniform"))
    assert mixed.routers["attention_router"].kind == "uniform"


def test_segments_as_long_as_the_sequences_would_never_be_decided_about():
    train = TrainConfig(
        tokens=64, proportions={"a": 1.0}, sequence_length=32, batch_sequences=2, micro_batch_sequences=2, lr=1e-3
    )
    routed = AssembleConfig(router=RouterConfig(pool=SEGMENTS))
    with pytest.raises(ValueError, match=r"router.pool.tokens=32 is no less than train.sequence_length=32"):
        MixtureConfig(assemble=routed, train=train)
    assert MixtureConfig(assemble=routed, train=None).kind == "btx"


def test_an_oracle_is_not_trained():
    train = TrainConfig(
        tokens=64, proportions={"a": 1.0}, sequence_length=32, batch_sequences=2, micro_batch_sequences=2, lr=1e-3
    )
    with pytest.raises(ValueError, match="assemble.router.kind=oracle is for evaluation only"):
        MixtureConfig(assemble=AssembleConfig(router=of("oracle")), train=train)


OPTIONS = "router_options"
TWICE = {"expert_sources": ["seed", "code", "code"], "one_per_source": True}
MODEL = {
    "gate_scale='straight_through' is not defined where a token has any number": {
        "router": "expert_choice",
        "gate_scale": "straight_through",
    },
    "per='word', tokens=256": {OPTIONS: {"per": "word"}},
    "first='nobody'": {OPTIONS: {"first": "nobody"}},
    "tokens=0": {OPTIONS: {"tokens": 0}},
    "per='segment' needs a top-k or soft router, got hash": {"router": "hash", OPTIONS: {"per": "segment"}},
    "first='seed' needs the seed among": {"experts": ["a", "b"], OPTIONS: {"per": "prefix"}},
    "first='uniform' needs a soft router": {OPTIONS: {"per": "prefix", "first": "uniform"}},
    "bias_rate=0.1 needs a top-k router that is trained, got soft": {"router": "soft", OPTIONS: {"bias_rate": 0.1}},
    "bias_rate=0.1 needs a top-k router that is trained, got topk_softmax": {
        OPTIONS: {"bias_rate": 0.1, "trained": False}
    },
    "one_per_source needs a top-k router, got uniform": TWICE | {"router": "uniform"},
    "top_k=3 exceeds the 2 sources": TWICE | {"num_experts_per_tok": 3},
    "attention router: top_k=3 exceeds the 2 sources": TWICE
    | {"attention": "mixture", "attention_router": {"kind": "topk_softmax", "top_k": 3}},
    "attention_router.top_k=4 is not between 1 and the 3 experts": {
        "attention": "mixture",
        "attention_router": {"kind": "topk_softmax", "top_k": 4},
    },
    "3 names and 2 sources": {"expert_sources": ["seed", "code"]},
    "tie=layers: the first layer of sample_top1 is soft": {"router": "sample_top1", "tie": "layers"},
    "balance=switch is constant where a token takes every expert": {
        "num_experts_per_tok": 3,
        "balance": "switch",
        "balance_coefficient": 0.1,
    },
    "similarity compares the decisions of layers, and there is one": {
        "similarity_coefficient": 0.1,
        "routed_layers": [1],
    },
    "similarity compares the decisions": {"similarity_coefficient": 0.1, "tie": "layers"},
}


@pytest.mark.parametrize("message", MODEL)
def test_a_model_cannot_have_a_router_that_means_nothing(message):
    fields = {"experts": ["seed", "code", "law"], "router": "topk_softmax"} | MODEL[message]
    with pytest.raises(ValueError, match=message):
        UpcycledConfig(seed=tiny.dense_config("llama").to_dict(), **fields)


def test_soft_attention_has_all_experts_where_the_feed_forward_takes_one_of_a_source():
    config = UpcycledConfig(
        seed=tiny.dense_config("llama").to_dict(),
        experts=["seed", "code", "code:2"],
        router="topk_softmax",
        attention="mixture",
        **TWICE | {"expert_sources": ["seed", "code", "code"]},
    )
    assert config.rule("ffn", 0).groups == (0, 1, 1) and config.rule("attention", 0).groups is None
