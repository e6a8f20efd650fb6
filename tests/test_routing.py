"""Routers against their loops, the fp32 rule, and the trace of one forward."""

from __future__ import annotations

import pytest
import reference
import torch

from upcycle.routing import GATE_SCALES, ROUTERS, Router, Routing, RoutingTrace, forced

E, T = 4, 6
CASES = [("topk_softmax", "none", k) for k in (1, 2, 4)]
CASES += [("softmax_topk", scale, k) for scale in GATE_SCALES for k in (1, 2, 4)]
CASES += [("soft", "none", E)]


def dense_gates(routing: Routing) -> torch.Tensor:
    return torch.zeros_like(routing.logits).scatter(1, routing.experts, routing.gates)


def test_every_router_has_a_twin():
    assert set(ROUTERS) == set(reference.ROUTERS)


@pytest.mark.parametrize("kind, scale, k", CASES)
def test_router_equals_loop_over_tokens(kind, scale, k):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    twin_logits = logits.detach().clone().requires_grad_()
    routing = ROUTERS[kind](logits, k, scale)
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
    gates = ROUTERS[kind](torch.randn(T, E), k, scale).gates
    torch.testing.assert_close(gates.sum(-1), torch.ones(T))


def test_compensate_gates_of_a_fresh_router_sum_to_one_and_plain_ones_to_k_over_e():
    logits = torch.zeros(T, E)
    torch.testing.assert_close(ROUTERS["softmax_topk"](logits, 1, "compensate").gates, torch.ones(T, 1))
    torch.testing.assert_close(ROUTERS["softmax_topk"](logits, 1, "none").gates, torch.full((T, 1), 1 / E))


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
    ROUTERS[kind](logits, 1, scale).gates.sum().backward()
    assert (logits.grad.abs().max() > 1e-6) == has_gradient


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
    router = Router(16, E, "ffn.0", "topk_softmax", 2)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(T, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = router(hidden, None)
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    torch.testing.assert_close(routing.logits, hidden.float() @ router.weight.T)


def test_a_recomputation_gets_the_first_decision_back():
    router, trace = Router(16, E, "ffn.0", "softmax_topk", 1), RoutingTrace()
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


def test_valid_tokens_are_those_of_this_forward():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert RoutingTrace(torch.ones(2, 4), None).valid_tokens() is None
    assert RoutingTrace(torch.ones(2, 4), mask).valid_tokens().tolist() == mask.bool().tolist()
    assert RoutingTrace(torch.ones(2, 1), mask).valid_tokens().tolist() == [[True], [True]]  # with a cache
