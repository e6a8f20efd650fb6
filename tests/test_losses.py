"""Losses against their loops; what they must not depend on."""

from __future__ import annotations

import weakref

import pytest
import reference
import tiny
import torch

from upcycle import losses
from upcycle.routing import ROUTERS, Routing, Rule, Seen

B, S, E, K = 3, 5, 4, 2
VALID = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()


def random_logits(layers: int = 2, batch: int = B) -> list[torch.Tensor]:
    return [torch.randn(batch * S, E, dtype=torch.float64, requires_grad=True) for _ in range(layers)]


def routed(logits: list[torch.Tensor], kind: str = "softmax_topk") -> list[Routing]:
    return [tiny.route(kind, layer, K) for layer in logits]


def twins_of(logits: list[torch.Tensor]) -> list[torch.Tensor]:
    return [layer.detach().clone().requires_grad_() for layer in logits]


def assert_same_gradients(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# -------------------------------------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("way", ["full", "recomputed", "at once"])
def test_cross_entropy_equals_loop_over_tokens(way, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    if way != "full":
        monkeypatch.setattr(losses, "FULL_LOGITS_BYTES", 0)
    head, vocab = torch.nn.Linear(8, 11), 11
    hidden = torch.randn(B, S, 8, requires_grad=True)
    ids = torch.randint(0, vocab, (B, S))
    valid = VALID.flip(1)  # padding on the right
    labels = losses.next_token_labels(ids, valid)
    weights = tuple(head.parameters()) if way == "at once" else ()
    nats, count = losses.cross_entropy_sum(hidden.flatten(0, 1), head, labels.flatten(), vocab, weights)
    gradients = torch.autograd.grad(3 * nats, [hidden, *head.parameters()])
    twin, twin_count = reference.next_token_cross_entropy(head(hidden), ids.masked_fill(~valid, reference.IGNORED))
    assert count == twin_count == 2 + 4 + 3
    torch.testing.assert_close(nats.double(), twin)
    for ours, theirs in zip(gradients, torch.autograd.grad(3 * twin, [hidden, *head.parameters()]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("at_once", [False, True])
def test_chunks_never_hold_all_logits(at_once, monkeypatch):
    monkeypatch.setattr(losses, "FULL_LOGITS_BYTES", 0)
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    head, seen, alive = torch.nn.Linear(8, 11), [], []

    def made(module, args, out):
        seen.append(len(out))
        alive.append(weakref.ref(out))

    head.register_forward_hook(made)
    weights = tuple(head.parameters()) if at_once else ()
    nats, _ = losses.cross_entropy_sum(torch.randn(10, 8), head, torch.randint(0, 11, (10,)), 11, weights)
    assert not any(one() is not None for one in alive)
    nats.backward()
    assert seen[:3] == [4, 4, 2]
    assert sorted(seen[3:]) == ([] if at_once else [2, 4, 4])  # backward computes each chunk's logits again


def test_frozen_heads_and_frozen_models_get_no_gradient(monkeypatch):
    monkeypatch.setattr(losses, "FULL_LOGITS_BYTES", 0)
    head, hidden, labels = torch.nn.Linear(8, 11), torch.randn(10, 8, requires_grad=True), torch.randint(0, 11, (10,))
    head.weight.requires_grad_(False)
    losses.cross_entropy_sum(hidden, head, labels, 11, tuple(head.parameters()))[0].backward()
    assert head.weight.grad is None and head.bias.grad.abs().sum() > 0 and hidden.grad.abs().sum() > 0
    with torch.no_grad():
        nats, _ = losses.cross_entropy_sum(hidden, head, labels, 11, tuple(head.parameters()))
    torch.testing.assert_close(nats, losses.token_nats(hidden, head, labels).sum().detach())


def test_at_once_under_autocast_gives_the_gradients_of_full_logits(monkeypatch):
    """Weights are cast once and used by every chunk; sums over chunks are fp32."""
    head = torch.nn.Linear(16, 50, bias=False)
    hidden, labels = torch.randn(64, 16, requires_grad=True), torch.randint(0, 50, (64,))
    found = []
    for limit in (2**62, 0):
        monkeypatch.setattr(losses, "FULL_LOGITS_BYTES", limit)
        monkeypatch.setattr(losses, "CHUNK_TOKENS", 16)
        with torch.autocast("cpu", torch.bfloat16):
            nats, _ = losses.cross_entropy_sum(hidden, head, labels, 50, tuple(head.parameters()))
        found.append([nats.detach(), *torch.autograd.grad(nats, [hidden, head.weight])])
    for full, chunked in zip(*found, strict=True):
        assert full.dtype == chunked.dtype == torch.float32
        assert (full - chunked).norm() <= 0.01 * full.norm()


def test_cross_entropy_of_no_targets_is_zero_with_finite_gradients():
    hidden = torch.randn(4, 8, requires_grad=True)
    nats, count = losses.cross_entropy_sum(hidden, torch.nn.Linear(8, 11), torch.full((4,), losses.IGNORED), 11)
    nats.backward()
    assert nats == 0 and count == 0 and torch.isfinite(hidden.grad).all()


# ------------------------------------------------------------------------------------------------------ load, balance


@pytest.mark.parametrize("kind", ["btx", "switch"])
def test_loads_equal_loop_over_tokens(kind):
    assert set(losses.LOADS) == set(reference.LOADS)
    (layer,) = routed(random_logits(1))
    decisions = [reference.softmax_topk(row, K) for row in layer.logits]
    expected = torch.stack([reference.LOADS[kind](decision, E) for decision in decisions])
    torch.testing.assert_close(losses.LOADS[kind](layer.gates, layer.experts, E), expected)


@pytest.mark.parametrize("router", ["topk_softmax", "softmax_topk", "soft"])
@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
@pytest.mark.parametrize("kind", ["btx", "switch"])
def test_balance_equals_loop_over_tokens(kind, scope, router):
    logits = random_logits()
    twins = twins_of(logits)
    total = losses.router_losses(routed(logits, router), VALID, kind, scope)["balance"] / VALID.sum()
    layers = [(t, [reference.ROUTERS[router](row, K) for row in t]) for t in twins]
    twin = reference.balance_loss(layers, VALID.tolist(), kind, scope)
    torch.testing.assert_close(total, twin)
    total.backward()
    twin.backward()
    assert_same_gradients(logits, twins)


@pytest.mark.parametrize("kind", ["btx", "switch"])
def test_balance_counts_dropped_tokens_as_the_router_chose(kind):
    """Switch's f_e is of choices, before capacity drops some; BTX's load is of gates, and a dropped token has none."""
    logits = random_logits()
    twins = twins_of(logits)
    seen, rule = Seen((B, S), VALID, training=True), Rule("switch", 1, capacity_factor=0.5)
    routings = [ROUTERS["switch"](one, rule, seen) for one in logits]
    assert any((routing.gates == 0).any() for routing in routings)
    total = losses.router_losses(routings, VALID, kind)["balance"] / VALID.sum()
    layers = []
    for twin in twins:
        decisions = []
        for row in range(B):
            tokens, valid = list(twin.view(B, S, E)[row]), VALID[row].tolist()
            decisions += reference.switch(reference.Sequence(tokens, valid, [0] * S, training=True), 1, "none", 0.5)
        layers.append((twin, decisions))
    twin = reference.balance_loss(layers, VALID.tolist(), kind, "sequence")
    torch.testing.assert_close(total, twin)
    total.backward()
    twin.backward()
    assert_same_gradients(logits, twins)


def test_z_loss_equals_loop_over_tokens():
    logits = random_logits()
    twins = twins_of(logits)
    total = losses.router_losses(routed(logits), VALID, z=True)["z"] / VALID.sum()
    twin = reference.z_loss(twins, VALID.tolist())
    torch.testing.assert_close(total, twin)
    total.backward()
    twin.backward()
    assert_same_gradients(logits, twins)


@pytest.mark.parametrize("name", ["similarity", "entropy"])
def test_similarity_and_entropy_equal_loops_over_tokens(name):
    logits = random_logits(3)
    twins = twins_of(logits)
    total = losses.router_losses(routed(logits), VALID, **{name: True})[name] / VALID.sum()
    twin = getattr(reference, f"{name}_loss")(twins, VALID.tolist())
    torch.testing.assert_close(total, twin)
    total.backward()
    twin.backward()
    assert_same_gradients(logits, twins)


def test_similarity_is_0_for_layers_that_route_alike_and_1_for_opposite_ones():
    one = torch.full((B * S, E), -50.0)
    alike, opposite = one.index_fill(1, torch.tensor([0]), 50.0), one.index_fill(1, torch.tensor([1]), 50.0)
    for other, expected in ((alike, 0.0), (opposite, 1.0)):
        found = losses.router_losses(routed([alike, other]), VALID, similarity=True)["similarity"] / VALID.sum()
        torch.testing.assert_close(found, torch.tensor(expected))


def test_tokens_that_a_router_decided_about_speak_for_their_whole_sequence():
    """A sequence's loss is the mean over those tokens, and weighs as much as its valid tokens."""
    logits = random_logits(2)
    decided = torch.rand(B * S) > 0.4
    marked = [routing._replace(decided=decided) for routing in routed(logits)]
    every = {"balance": "switch", "z": True, "similarity": True, "entropy": True}
    ours = losses.router_losses(marked, VALID, **every)
    assert set(ours) == {"balance", "z", "similarity", "entropy"}
    counted = VALID & decided.view(B, S)
    for name, value in ours.items():
        expected = 0.0
        for row in range(B):
            alone = torch.zeros_like(counted).index_fill(0, torch.tensor(row), True) & counted
            loss = losses.router_losses(routed(logits), alone, **every)[name] / alone.sum().clamp_min(1)
            expected = expected + loss * VALID[row].sum() * bool(alone.any())
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global"])
@pytest.mark.parametrize("kind", ["btx", "switch"])
def test_uniform_routing_has_balance_one(kind, scope):
    experts = torch.arange(8)[:, None] % E
    routing = Routing(torch.zeros(8, E), torch.ones(8, 1), experts)
    value = losses.router_losses([routing], torch.ones(2, 4).bool(), kind, scope)["balance"] / 8
    torch.testing.assert_close(value, torch.tensor(1.0))


@pytest.mark.parametrize("kind", ["btx", "switch"])
def test_opposite_imbalances_of_layers_do_not_cancel(kind):
    """Two layers, each collapsed on another of two experts: pooled they look uniform (1.0), each alone is 2.0."""
    layers = [
        Routing(torch.tensor([[30.0, -30.0]]).roll(e, 1).expand(S, 2), torch.ones(S, 1), torch.full((S, 1), e))
        for e in range(2)
    ]
    value = losses.router_losses(layers, torch.ones(1, S).bool(), kind)["balance"] / S
    torch.testing.assert_close(value, torch.tensor(2.0))


def test_global_scope_on_one_process_is_the_micro_batch():
    routings = routed(random_logits())
    values = [losses.router_losses(routings, VALID, "btx", scope)["balance"] for scope in ("global", "micro_batch")]
    torch.testing.assert_close(*values)


# -------------------------------------------------------------------------------------------------------- invariances


def accumulated_gradients(logits, scope, parts):
    """Gradients of Σ over micro-batches of the sums, divided once by all valid tokens."""
    copies = twins_of(logits)
    for rows in parts:
        tokens = torch.cat([torch.arange(row * S, (row + 1) * S) for row in rows])
        sums = losses.router_losses(routed([c[tokens] for c in copies]), VALID[rows], "btx", scope, z=True)
        ((0.3 * sums["balance"] + 0.7 * sums["z"]) / VALID.sum()).backward()
    return [c.grad for c in copies]


@pytest.mark.parametrize("parts", [[[0], [1], [2]], [[0, 1], [2]], [[2, 0], [1]]])
def test_sequence_scope_gradients_do_not_depend_on_the_split(parts):
    logits = random_logits()
    whole = accumulated_gradients(logits, "sequence", [[0, 1, 2]])
    for ours, theirs in zip(accumulated_gradients(logits, "sequence", parts), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_micro_batch_scope_gradients_do_depend_on_the_split():
    logits = random_logits()
    whole, split = (accumulated_gradients(logits, "micro_batch", parts) for parts in ([[0, 1, 2]], [[0], [1], [2]]))
    assert max((a - b).abs().max() for a, b in zip(whole, split, strict=True)) > 1e-4


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global"])
def test_padding_never_counts(scope):
    logits = random_logits()
    sums = losses.router_losses(routed(logits), VALID, "btx", scope, z=True)
    sum(sums.values()).backward()
    noise = 5 * torch.randn(B * S, E, dtype=torch.float64) * ~VALID.flatten()[:, None]
    other = losses.router_losses(routed([layer + noise for layer in logits]), VALID, "btx", scope, z=True)
    for name in sums:
        torch.testing.assert_close(sums[name], other[name])
    assert all(layer.grad[~VALID.flatten()].abs().max() == 0 for layer in logits)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global"])
@pytest.mark.parametrize("only_padding", [[0], [0, 1, 2]])
def test_a_sequence_of_padding_adds_nothing(scope, only_padding):
    valid = VALID.clone()
    valid[only_padding] = False
    logits = random_logits()
    sums = losses.router_losses(routed(logits), valid, "btx", scope, z=True)
    sum(sums.values()).backward()
    assert all(torch.isfinite(layer.grad).all() for layer in logits)
    if len(only_padding) == B:
        assert all(value == 0 for value in sums.values())


def test_a_loss_not_asked_for_is_not_computed(monkeypatch):
    monkeypatch.setattr(losses, "balance_sum", None)
    monkeypatch.setattr(losses, "z_sum", None)
    assert losses.router_losses(routed(random_logits()), VALID) == {}


def test_labels_are_the_next_valid_tokens():
    ids = torch.arange(10).view(2, 5)
    assert losses.next_token_labels(ids).tolist() == [[1, 2, 3, 4, -100], [6, 7, 8, 9, -100]]
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert losses.next_token_labels(ids, valid)[1].tolist() == [6, 7, -100, -100, -100]


def test_padding_predicts_nothing():
    ids, valid = torch.arange(5)[None], torch.tensor([[0, 0, 1, 1, 1]])
    assert losses.next_token_labels(ids, valid).tolist() == [[-100, -100, 3, 4, -100]]
