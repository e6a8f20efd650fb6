"""Experts removed and forced: against mixtures that never had them, and against the dense models that they are."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from evals.ablation import ablate, experts_by_name, why_not
from tests.domains import two_domains
from tests.reference import windows
from tests.tiny import VOCAB, dense_models, mean_of, mixture_of, pack, router_weights, tokens, told_by
from upcycle.batches import TokenArray
from upcycle.config import EvalConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.router import RoutingTrace
from upcycle.store import ignore

S = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_domains(tmp_path_factory.mktemp("domains"))


def without(models, gone: int, ffn_rows, attention_rows, choices: dict) -> UpcycledForCausalLM:
    """A mixture that never had expert `gone`, with everything else as the whole one's: what experts share, router rows."""
    kept = [index for index in range(len(models)) if index != gone]
    smaller = mixture_of([models[index] for index in kept], **choices)
    rows = [[weights[kept] for weights in side] for side in (ffn_rows, attention_rows)]
    dicts = [model.state_dict() for model in models]
    packed = pack(smaller.config, mean_of(dicts), [dicts[index] for index in kept], *rows)
    smaller.load_state_dict(packed, strict=False)
    return smaller


@pytest.mark.parametrize("gone", [0, 2])
@pytest.mark.parametrize(
    "choices",
    [
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 2},
        {"num_experts_per_tok": 2, "router": "softmax_topk"},
        {"router": "soft"},
        {"router": "switch"},
        {"router": "expert_choice", "num_experts_per_tok": 2},
        {"num_experts_per_tok": 1, "attention": "mixture"},
        {"attention": "mixture", "kv": "shared", "attention_router": {"kind": "topk_softmax", "top_k": 2}},
        {"tie": "layers", "attention": "mixture"},
        {"tie": "sublayers", "attention": "mixture"},
        {"tie": "skip"},
        {"router": "soft", "router_options": {"per": "segment", "tokens": 3, "first": "uniform"}},
        {"num_experts_per_tok": 1, "router": "softmax_topk", "router_options": {"bias_rate": 0.1}},
    ],
    ids=str,
)
def test_a_removed_expert_is_one_that_never_was(choices, gone):
    models = dense_models("llama", 4)
    sizes = (2, 4, models[0].config.hidden_size)
    ffn, attention = router_weights(*sizes, rng_seed=3), router_weights(*sizes, rng_seed=4)
    whole = mixture_of(models, ffn, attention, **choices)
    if choices.get("tie") == "layers":
        ffn, attention = ffn[:1], attention[:1]
        whole = mixture_of(models, ffn, attention, **choices)
    smaller = without(models, gone, ffn, attention, choices)
    trace = RoutingTrace(removed=dict.fromkeys(whole.config.parts, gone))
    ids = tokens(3, 12)
    with torch.no_grad():
        found, expected = whole(ids, trace=trace).logits, smaller(ids).logits
        as_it_is = whole(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # routers compute in fp32, here over fewer rows
    assert (as_it_is - expected).abs().max() > 1e-3 * expected.abs().max()
    for part in whole.config.parts:
        assert not any((routing.gates * (routing.experts == gone)).any() for routing in trace.of(part))


def test_a_balancing_bias_cannot_bring_a_removed_expert_back():
    mixture = mixture_of(dense_models("llama", 3), num_experts_per_tok=1, router_options={"bias_rate": 0.1})
    for name, buffer in mixture.named_buffers():
        if name.endswith("router.bias"):
            buffer[1] = 5.0
    free, trace = RoutingTrace(), RoutingTrace(removed={"ffn": 1})
    mixture(tokens(), trace=free)
    mixture(tokens(), trace=trace)
    assert all((routing.experts == 1).all() for routing in free.of("ffn"))
    assert not any((routing.experts == 1).any() for routing in trace.of("ffn"))


def test_one_sublayer_can_lose_its_expert_and_the_other_keep_its():
    mixture = mixture_of(dense_models("llama", 3), attention="mixture", num_experts_per_tok=1)
    trace = RoutingTrace(removed={"attention": 2})
    mixture(tokens(), trace=trace)
    assert all(
        (routing.gates[:, 2] == 0).all() and routing.gates.sum(1).allclose(torch.tensor(1.0))
        for routing in trace.of("attention")
    )
    assert any((routing.experts == 2).any() for routing in trace.of("ffn"))


def slow_nats(model, path, **told) -> tuple[float, int]:
    nats, count = 0.0, 0
    for inputs, labels in windows(TokenArray(path, "test").tokens, S):
        logits = model(inputs[None], **({"trace": RoutingTrace(**told)} if told else {})).logits[0]
        for place, label in enumerate(labels.tolist()):
            if label >= 0:
                nats -= logits[place].log_softmax(-1)[label].item()
                count += 1
    return nats, count


@torch.no_grad()
def test_ablation_equals_a_loop_over_tokens_with_dense_models_and_smaller_mixtures(data):
    models = dense_models("llama", 3, dtype=torch.float32)
    ffn = [weights.float() for weights in router_weights(2, 3, 32, rng_seed=3)]
    attention = [weights.float() for weights in router_weights(2, 3, 32, rng_seed=4)]
    choices = {"attention": "mixture", "num_experts_per_tok": 1}
    mixture = mixture_of(models, ffn, attention, **choices)
    steps = []
    config = EvalConfig(sequence_length=S, batch_sequences=4)
    found = ablate(mixture, data, config, lambda done, total, doing: steps.append((done, total)))
    assert list(found["experts"]) == ["seed", "code", "law"] and steps[-1][0] == steps[-1][1]
    assert steps == sorted(steps)
    for domain, path in data.items():
        assert found["whole"][domain]["nats"] == pytest.approx(slow_nats(mixture, path)[0], rel=1e-5)
        for index, one in enumerate(found["experts"].values()):
            smaller = without(models, index, ffn, attention, choices)
            nats, count = slow_nats(smaller, path)
            assert one["removed"][domain] == {"nats": pytest.approx(nats, rel=1e-5), "tokens": count}
            own = copy.deepcopy(models[index])  # the dense model with what experts share
            rest = mean_of([model.state_dict() for model in models])
            shared = {
                name: tensor for name, tensor in rest.items() if ".mlp." not in name and ".self_attn." not in name
            }
            own.load_state_dict(own.state_dict() | shared)
            assert one["forced"][domain]["nats"] == pytest.approx(slow_nats(own, path)[0], rel=1e-5)
    json.dumps(found, allow_nan=False)


def test_tokens_of_a_removed_expert_take_the_next_best(data):
    """Logits 50, −50 and 0: without the seed's expert the low half goes to law's, which nobody had."""
    low = np.where(np.arange(VOCAB) < VOCAB // 2, 5.0, -5.0)
    mixture = told_by(mixture_of(dense_models("llama", 3), num_experts_per_tok=1), "embed_tokens.weight", low)
    ids = torch.from_numpy(TokenArray(data["high"], "test").tokens[:S].astype(np.int64))[None]
    for removed, (of_low, of_high) in ((None, (0, 1)), (0, (2, 1)), (1, (0, 2)), (2, (0, 1))):
        trace = RoutingTrace(removed=None if removed is None else {"ffn": removed})
        mixture(ids, trace=trace)
        expected = torch.where(ids[0] < VOCAB // 2, of_low, of_high)
        assert all((routing.experts[:, 0] == expected).all() for routing in trace.of("ffn"))


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"router": "hash"}, "hash decides by no weights"),
        ({"router": "uniform"}, "uniform decides by no weights"),
        (
            {"router_options": {"per": "segment", "tokens": 3}},
            "the first tokens, about which nothing is known yet, go to it",
        ),
    ],
)
def test_a_router_that_cannot_do_without_an_expert_says_why(data, choices, reason):
    mixture = mixture_of(dense_models("llama", 3, dtype=torch.float32), num_experts_per_tok=1, **choices)
    assert why_not(mixture.config, {"ffn": 0}) == reason
    with pytest.raises(ValueError, match=f"router ffn.0: expert 0 cannot be removed, {reason}"):
        mixture(tokens(), trace=RoutingTrace(removed={"ffn": 0}))
    config = EvalConfig(sequence_length=S, batch_sequences=4, max_tokens=40)
    seed = ablate(mixture, data, config, ignore)["experts"]["seed"]
    assert seed["removed"] is None and seed["reason"] == reason and seed["forced"].keys() == data.keys()


def test_experts_are_paired_by_name():
    models = dense_models("llama", 3, dtype=torch.float32)
    mixture = mixture_of(models, attention="mixture")
    assert experts_by_name(mixture.config) == {
        name: {"ffn": index, "attention": index} for index, name in enumerate(("seed", "code", "law"))
    }
    mixture.config.experts, mixture.config.attention_experts = ["seed/1", "seed/2", "law"], ["seed", "law", "code"]
    assert experts_by_name(mixture.config) == {
        "seed/1": {"ffn": 0}, "seed/2": {"ffn": 1}, "law": {"ffn": 2, "attention": 1}, "seed": {"attention": 0},
        "code": {"attention": 2},
    }  # fmt: skip
