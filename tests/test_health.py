"""What a training step records of its routers, against loops over tokens and routers whose answer is known."""

import math
from collections import defaultdict

import pytest
import torch

from tests.domains import two_domains, write_tokens
from tests.test_evals import by_domain_router
from tests.test_train import config, mixture, rows, run
from tests.tiny import VOCAB, dense_models, mixture_of
from upcycle.batches import Batches
from upcycle.router import RoutingTrace

S, B = 16, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_domains(tmp_path_factory.mktemp("domains"))


def settings(**changes):
    return config(**dict(tokens=B * S, batch_sequences=B, micro_batch_sequences=B) | changes)


def slow_information(weighed: list[tuple[int, list[float]]]) -> float:
    """I(domain; expert) of (domain, weights of the experts), one for each token, every domain as likely as another."""
    sums, totals = defaultdict(float), defaultdict(float)
    for domain, weights in weighed:
        for expert, weight in enumerate(weights):
            sums[domain, expert] += weight
            totals[domain] += weight
    joint = {key: weight / totals[key[0]] / len(totals) for key, weight in sums.items()}
    share = defaultdict(float)
    for (_, expert), p in joint.items():
        share[expert] += p
    return sum(p * math.log(p * len(totals) / share[expert]) for (_, expert), p in joint.items() if p)


def slow_weights(routing, part: str) -> list[list[float]]:
    """Of each token: attention's gates; of feed-forward experts that it has, equal shares."""
    found = []
    for gates, experts in zip(routing.gates.tolist(), routing.experts.tolist(), strict=True):
        weights = [0.0] * routing.logits.shape[1]
        for gate, expert in zip(gates, experts, strict=True):
            weights[expert] += gate if part == "attention" else 1 / len(experts)
        found.append(weights)
    return found


@pytest.mark.parametrize("micro", [B, 2])
def test_information_of_a_step_equals_a_loop_over_its_tokens(data, tmp_path, micro):
    chosen = settings(micro_batch_sequences=micro)
    model, trained = (mixture("mixture", num_experts_per_tok=2).train() for _ in range(2))
    run(trained, chosen, data, tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    batches, trace = Batches(data, chosen.proportions, S, B, chosen.rng_seed), RoutingTrace()
    with torch.no_grad():
        model(torch.from_numpy(batches.batch(0)), trace=trace)
    own, dealt = batches.domains(0).tolist()
    assert sorted(own) == sorted(dealt) == [0] * (B // 2) + [1] * (B // 2) and own != dealt
    for part in ("ffn", "attention"):
        for layer, routing in enumerate(trace.of(part)):
            for name, domains in (("information", own), ("information_shuffled", dealt)):
                weighed = [(domains[at // S], weights) for at, weights in enumerate(slow_weights(routing, part))]
                expected = slow_information(weighed)
                assert row[f"{part}_{name}"][layer] == pytest.approx(expected, abs=2e-6) and expected > 1e-5


def test_the_domains_of_a_step_are_those_of_its_rows(data):
    """The lower half of the vocabulary is one domain's, the upper half the other's; token 2 ends documents of both."""
    batches = Batches(data, {"low": 0.7, "high": 0.3}, S, B, 3)
    names = [name for name, _ in batches.counts]
    dealt = []
    for step in range(5):
        own, other = batches.domains(step)
        for row, domain in zip(batches.batch(step), own, strict=True):
            words = row[row != 2]
            assert ((words < VOCAB // 2) == (names[domain] == "low")).all()
        dealt.append((other != own).any())
    assert any(dealt)


def test_routers_by_domain_are_seen_and_lone_domains_say_nothing(data, tmp_path):
    """Of two domains that each have an expert of their own I = log 2, but for the token that ends documents."""
    options = dict(num_experts_per_tok=1, router="softmax_topk")
    model = by_domain_router(mixture_of(dense_models("llama", 3, dtype=torch.float32), **options))
    run(model, settings(tokens=8 * B * S, lr=1e-6), data, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert all(0.5 < layer <= math.log(2) for row in found for layer in row["ffn_information"])
    chance = [layer for row in found for layer in row["ffn_information_shuffled"]]
    assert sum(chance) / len(chance) < 0.3  # of so few sequences one deal in 35 is the truth
    alone = {"low": write_tokens(tmp_path / "low", rng_seed=1)}
    run(mixture(), settings(proportions={"low": 1.0}), alone, tmp_path / "lone")
    assert not [name for name in rows(tmp_path / "lone")[0] if "information" in name]
