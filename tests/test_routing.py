"""Routers against their loops, the fp32 rule, and the trace of one forward."""

from __future__ import annotations

import pytest
import reference
import tiny
import torch

from upcycle.router import Router, RoutingTrace, masks_for_routers, pooled
from upcycle.routing import GATE_SCALES, ROUTERS, Routing, Rule, Seen, forced

E, T = 4, 6
CASES = [("topk_softmax", "none", k) for k in (1, 2, 4)]
CASES += [("softmax_topk", scale, k) for scale in GATE_SCALES for k in (1, 2, 4)]
CASES += [("soft", "none", E)]


def dense_gates(routing: Routing) -> torch.Tensor:
    return torch.zeros_like(routing.logits).scatter(1, routing.experts, routing.gates)


@pytest.mark.parametrize("kind, scale, k", CASES)
def test_router_equals_loop_over_tokens(kind, scale, k):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    twin_logits = logits.detach().clone().requires_grad_()
    routing = tiny.route(kind, logits, k, scale)
    decisions = [reference.ROUTERS[kind](row, k, scale) for row in twin_logits]
    assert routing.experts.tolist() == [[e for e, _ in decision] for decision in decisions]
    twin_gates = torch.stack([torch.stack([g for _, g in decision]) for decision in decisions])
    torch.testing.assert_close(routing.gates, twin_gates)
    weight = torch.randn_like(twin_gates)
    (routing.gates * weight).sum().backward()
    (twin_gates * weight).sum().backward()
    torch.testing.assert_close(logits.grad, twin_logits.grad)


@pytest.mark.parametrize(
    "kind, scale, k", [c for c in CASES if c[1] in ("sum_to_one", "straight_through") or c[0] != "softmax_topk"]
)
def test_gates_sum_to_one(kind, scale, k):
    gates = tiny.route(kind, torch.randn(T, E), k, scale).gates
    torch.testing.assert_close(gates.sum(-1), torch.ones(T))


def test_compensate_gates_of_a_fresh_router_sum_to_one_and_plain_ones_to_k_over_e():
    logits = torch.zeros(T, E)
    torch.testing.assert_close(tiny.route("softmax_topk", logits, 1, "compensate").gates, torch.ones(T, 1))
    torch.testing.assert_close(tiny.route("softmax_topk", logits, 1, "none").gates, torch.full((T, 1), 1 / E))


@pytest.mark.parametrize(
    "kind, scale, has_gradient",
    [
        ("topk_softmax", "none", False),
        ("softmax_topk", "none", True),
        ("softmax_topk", "sum_to_one", False),
        ("softmax_topk", "straight_through", True),
        ("softmax_topk", "compensate", True),
    ],
)
def test_which_top1_routers_get_a_gradient(kind, scale, has_gradient):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    tiny.route(kind, logits, 1, scale).gates.sum().backward()
    assert (logits.grad.abs().max() > 1e-6) == has_gradient


def test_a_bias_moves_the_selection_and_no_gate():
    """Loss-free balancing: with a bias of 1 on expert 3 it is always among the two; its gate is still its probability."""
    logits, bias = torch.randn(50, E), torch.tensor([0.0, 0.0, 0.0, 1.0])
    seen = Seen((1, 50), bias_E=bias)
    for kind in ("topk_softmax", "softmax_topk"):
        routing = ROUTERS[kind](logits, Rule(kind, 2), seen)
        assert (routing.experts == 3).any(1).all()
        chosen = logits.gather(1, routing.experts) if kind == "topk_softmax" else logits
        expected = chosen.softmax(-1) if kind == "topk_softmax" else logits.softmax(-1).gather(1, routing.experts)
        torch.testing.assert_close(routing.gates, expected)


def test_sampled_experts_are_drawn_with_the_routers_probabilities():
    """At temperature 1 the largest of W x + G is a draw from softmax(W x) (the Gumbel-max theorem)."""
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    draws = 20_000
    torch.manual_seed(0)
    seen = Seen((1, draws), training=True, step=0)
    routing = ROUTERS["sample_top1"](logits.expand(draws, E), Rule("sample_top1"), seen)
    found = torch.bincount(routing.experts.flatten(), minlength=E) / draws
    assert (found - logits.softmax(0)).abs().max() < 4 * (0.25 / draws) ** 0.5


@pytest.mark.parametrize("step, temperature", [(0, 1.0), (4000, 0.67032), (100_000, 0.5)])
def test_the_gate_of_a_sample_is_the_tempered_softmax(step, temperature):
    logits = torch.randn(T, E)
    seen = Seen((1, T), training=True, step=step)
    torch.manual_seed(1)
    routing = ROUTERS["sample_top1"](logits, Rule("sample_top1"), seen)
    torch.manual_seed(1)
    gumbel = -torch.empty_like(logits).exponential_().log()
    expected, experts = ((logits + gumbel) / temperature).softmax(-1).max(-1, keepdim=True)
    torch.testing.assert_close(routing.gates, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(routing.experts, experts)


def test_switch_drops_what_comes_too_late_in_training_only():
    """Six tokens that all want expert 0, room for ceil(1.5 · 6 / 4) = 3."""
    logits = torch.tensor([[5.0, 0.0, 0.0, 0.0]]).expand(T, E)
    rule = Rule("switch", 1, "straight_through")
    trained = ROUTERS["switch"](logits, rule, Seen((1, T), training=True))
    assert trained.gates.flatten().tolist() == [1, 1, 1, 0, 0, 0]
    assert ROUTERS["switch"](logits, rule, Seen((1, T))).gates.flatten().tolist() == [1] * T


def test_expert_choice_balances_what_top_k_does_not():
    """Every token likes expert 0 best; experts that choose take K/E of the tokens each, but for the first few."""
    logits = torch.randn(400, E) + torch.tensor([2.0, 0.0, 0.0, 0.0])
    routing = ROUTERS["expert_choice"](logits, Rule("expert_choice", 1), Seen((1, 400), training=True))
    shares = (routing.gates > 0).float().mean(0)
    assert (shares - 1 / E).abs().max() < 0.06
    assert (logits.argmax(1) == 0).float().mean() > 0.7


def test_the_hash_spreads_a_vocabulary_evenly():
    ids = torch.arange(50_000).view(1, -1)
    for experts in (2, 3, 4, 7, 8):
        seen = Seen((1, 50_000), token_ids_BS=ids)
        routing = ROUTERS["hash"](torch.zeros(50_000, experts), Rule("hash"), seen)
        shares = torch.bincount(routing.experts.flatten(), minlength=experts) / 50_000
        assert (shares * experts - 1).abs().max() < 0.01


def test_a_hash_without_ids_is_refused():
    with pytest.raises(ValueError, match="needs token ids, got embeddings alone; pass input_ids"):
        tiny.route("hash", torch.zeros(T, E))


@pytest.mark.parametrize("per", ["segment", "prefix"])
@pytest.mark.parametrize("cuts", [[1] * 11, [4, 7], [3, 3, 5], [2, 9], [10, 1]])
def test_pooled_logits_are_the_same_in_any_number_of_forwards(per, cuts):
    """What is kept between forwards is enough: pieces of a padded batch get the very logits of the whole."""
    logits, valid = torch.randn(2, 11, E), torch.ones(2, 11, dtype=torch.bool)
    valid[1, :2] = False
    rule = Rule("soft", per=per, tokens=3)
    whole, first, _, end = pooled(logits, valid, rule, None)
    kept, parts = None, []
    for piece, mask in zip(logits.split(cuts, 1), valid.split(cuts, 1), strict=True):
        part, part_first, _, kept = pooled(piece, mask, rule, kept)
        parts.append((part, part_first))
    torch.testing.assert_close(torch.cat([part for part, _ in parts], 1), whole)
    assert torch.equal(torch.cat([first for _, first in parts], 1), first)
    for ours, theirs in zip(kept, end, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("per", ["segment", "prefix"])
def test_padding_anywhere_changes_no_pooled_logits(per):
    """After a token, before one, right behind a whole segment: in one forward, or cut there, a row is as if alone."""
    logits, rule = torch.randn(1, 8, E), Rule("soft", per=per, tokens=3)
    alone, first, *_ = pooled(logits, torch.ones(1, 8, dtype=torch.bool), rule, None)
    for gap in range(9):
        padded = torch.cat([logits[:, :gap], torch.full((1, 2, E), 9.0), logits[:, gap:]], 1)
        valid = torch.ones(1, 10, dtype=torch.bool)
        valid[0, gap : gap + 2] = False
        for cut in range(11):
            kept, parts = None, []
            for piece, mask in ((padded[:, :cut], valid[:, :cut]), (padded[:, cut:], valid[:, cut:])):
                if piece.shape[1]:
                    part, part_first, _, kept = pooled(piece, mask, rule, kept)
                    parts.append((part, part_first))
            found, found_first = (torch.cat(one, 1)[valid] for one in zip(*parts, strict=True))
            torch.testing.assert_close(found, alone[0])
            assert torch.equal(found_first, first[0])


def test_of_experts_of_one_source_the_first_of_equals_is_taken():
    """A token takes two experts of two sources, also where their logits are the same to the bit."""
    logits = torch.zeros(T, E)
    routing = tiny.route("topk_softmax", logits, 2, groups=(0, 0, 1, 1))
    assert routing.experts.sort(-1).values.tolist() == [[0, 2]] * T


@pytest.mark.parametrize(("factor", "tokens", "experts"), [(1.1, 50, 11), (1.1, 90, 9), (1.5, 6, 4)])
def test_a_capacity_is_no_place_larger_for_a_rounding(factor, tokens, experts):
    """1.1 · 50 / 11 is five, and in binary a little more."""
    logits = torch.zeros(tokens, experts).index_fill(1, torch.tensor([0]), 5.0)
    rule = Rule("switch", 1, "straight_through", capacity_factor=factor)
    kept = ROUTERS["switch"](logits, rule, Seen((1, tokens), training=True)).gates.sum()
    sequence = reference.Sequence(list(logits), [True] * tokens, [0] * tokens, training=True)
    twin = reference.switch(sequence, 1, "straight_through", factor)
    assert kept == sum(gate for ((_, gate),) in twin)


def test_a_cache_that_lost_tokens_is_refused():
    """Routers that decide per segment cannot go back: what they remember is of all tokens of the cache."""
    options = {"per": "segment", "tokens": 3}
    mixture = tiny.mixture_of(tiny.dense_models("llama", dtype=torch.float32), router_options=options)
    cache = mixture(tiny.tokens(), use_cache=True).past_key_values
    cache.crop(-2)
    with pytest.raises(ValueError, match="past_key_values holds 7 tokens, but not what the routers"):
        mixture(tiny.tokens(2, 1), past_key_values=cache)


REMEMBERING = {"router_options": {"per": "segment", "tokens": 3}}


@torch.no_grad()
def test_padding_is_seen_beside_embeddings_too():
    mixture = tiny.mixture_of(tiny.dense_models("llama"), **REMEMBERING)
    ids, mask = tiny.tokens(2, 8), tiny.left_padding(0, 2, sequence=8)
    embedded = mixture.get_input_embeddings()(ids)
    found = mixture(inputs_embeds=embedded, attention_mask=mask).logits
    torch.testing.assert_close(found, mixture(ids, mask).logits)
    assert (mixture(ids).logits[1] - found[1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("given", [{}, {"use_cache": None}, {"use_cache": True}])
def test_routers_remember_whoever_asks_for_the_cache(given):
    mixture, ids = tiny.mixture_of(tiny.dense_models("llama"), **REMEMBERING), tiny.tokens(2, 8)
    cache = mixture(ids[:, :5], **given).past_key_values
    found = mixture(ids[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(found.float(), mixture(ids).logits[:, 5:].float())


def test_what_cannot_be_taken_back_is_not_generated_with_an_assistant():
    models = tiny.dense_models("llama", dtype=torch.float32)
    plain, remembering = tiny.mixture_of(models), tiny.mixture_of(models, **REMEMBERING)
    options = {"assistant_model": models[0], "max_new_tokens": 3, "do_sample": False}
    ids = tiny.tokens(1, 4)
    assert plain.generate(ids, **options).tolist() == plain.generate(ids, max_new_tokens=3, do_sample=False).tolist()
    with pytest.raises(ValueError, match="stateful"):
        remembering.generate(ids, **options)


def test_a_router_without_the_one_it_follows_is_refused():
    router = Router(16, E, "ffn.1", Rule("topk_softmax", 2), decides="ffn.0")
    with pytest.raises(ValueError, match=r"router ffn\.1 follows ffn\.0, which has not decided"):
        router(torch.randn(T, 16), None)


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("expert", range(E))
def test_forced_routing_is_one_hot(expert, k):
    routing = forced(torch.randn(T, E), k, expert)
    one_hot = torch.nn.functional.one_hot(torch.full((T,), expert), E).float()
    torch.testing.assert_close(dense_gates(routing), one_hot)
    assert all(len(set(row)) == k for row in routing.experts.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_router_computes_in_fp32(dtype, autocast):
    router = Router(16, E, "ffn.0", Rule("topk_softmax", 2))
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(T, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = router(hidden, None)
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    torch.testing.assert_close(routing.logits, hidden.float() @ router.weight.T)


def test_a_recomputation_gets_the_first_decision_back():
    router, trace = Router(16, E, "ffn.0", Rule("softmax_topk", 1)), RoutingTrace()
    torch.nn.init.normal_(router.weight)
    first = router(torch.randn(T, 16), trace)
    assert router(torch.randn(T, 16), trace) is first
    assert trace.of("ffn") == [first]


def test_trace_keeps_parts_apart_in_layer_order():
    trace = RoutingTrace()
    routings = {
        f"{part}.{n}": Routing(torch.full((1, 1), n), None, None) for n in range(12) for part in ("attention", "ffn")
    }
    for name, routing in routings.items():
        trace.record(name, routing)
    assert [r.logits.item() for r in trace.of("ffn")] == list(range(12))
    assert len(trace.of("attention")) == 12


def test_routers_see_the_padding_of_this_forward():
    mask, ids = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), torch.ones(2, 4)
    trace = RoutingTrace()
    assert trace.see(ids, 4, None) is None and trace.valid_BS is None
    assert trace.see(ids, 4, mask) is mask and trace.valid_BS.tolist() == mask.bool().tolist()
    trace.see(None, 1, mask)  # with a cache, embeddings given
    assert trace.valid_BS.tolist() == [[True], [True]] and trace.token_ids_BS is None


@pytest.mark.parametrize(
    "prepared", [None, torch.ones(2, 1, 4, 4), {"full_attention": torch.ones(1), "sliding_attention": None}]
)
def test_a_mask_that_generation_has_prepared_comes_with_the_padding(prepared):
    mask, trace = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), RoutingTrace()
    given = trace.see(torch.ones(2, 2), 2, masks_for_routers(mask, 2, prepared))
    assert given is prepared or given == prepared
    assert trace.valid_BS.tolist() == [[True, True], [True, True]]
    trace.see(torch.ones(2, 4), 4, masks_for_routers(mask, 4, prepared))
    assert trace.valid_BS.tolist() == mask.bool().tolist()


def test_the_first_segments_own_mean_is_of_its_tokens_that_are_there_without_a_gradient():
    """Padding counts for nothing, and generation goes on with the tokens so far."""
    logits = torch.randn(2, 8, 3, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, :2] = False
    rule = Rule("soft", 3, per="segment", tokens=4, first="own_mean")
    found = pooled(logits, valid, rule, None)
    for row, places in ((0, [0, 1, 2, 3]), (1, [2, 3, 4, 5])):
        own = logits[row, places].mean(0).expand(4, 3)
        torch.testing.assert_close(found.logits[row, places], own)
        after = [place for place in range(8) if place > places[-1]]
        torch.testing.assert_close(found.logits[row, after], logits[row, places].mean(0).expand(len(after), 3))
    (gradient,) = torch.autograd.grad(found.logits[0, :4].sum(), logits, retain_graph=True, allow_unused=True)
    assert gradient is None or not gradient.any()
    first = pooled(logits[:1, :3], valid[:1, :3], rule, None)
    torch.testing.assert_close(first.logits[0], logits[0, :3].mean(0).expand(3, 3))
    second = pooled(logits[:1, 3:], valid[:1, 3:], rule, first.kept)
    torch.testing.assert_close(second.logits[0, :1], logits[0, :4].mean(0).expand(1, 3))
    torch.testing.assert_close(second.logits[0, 1:], logits[0, :4].mean(0).expand(4, 3))
