"""What routers go by: figures of models whose routing is known, and of any model against slow loops."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evals.microscope import (
    BINS,
    EXAMPLES,
    LEAST_TOKENS,
    ROTATIONS,
    Decided,
    Microscope,
    Vocabulary,
    binned,
    information,
)
from evals.perplexity import evaluate
from evals.statistics import generator
from evals.words import CONTINUES, NEITHER, STARTS, parts_of_words, token_texts
from tests.domains import EOS, two_domains, write_tokens
from tests.reference import windows
from tests.tiny import VOCAB, dense_models, mixture_of, told_by
from upcycle.batches import TokenArray
from upcycle.config import EvalConfig
from upcycle.router import RoutingTrace
from upcycle.store import ignore

S = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """One domain over the whole vocabulary."""
    return {"all": write_tokens(tmp_path_factory.mktemp("mixed") / "all", documents=60, rng_seed=5)}


def routing_of(model, data, **changes) -> dict:
    settings = EvalConfig(**dict(sequence_length=S, batch_sequences=4) | changes)
    return evaluate(model, data, settings, ignore)[0]["routing"]


def models_of(kind="llama"):
    return dense_models(kind, 3, dtype=torch.float32)


def entropy(shares) -> float:
    return -sum(p * math.log(p) for p in shares if p)


# ------------------------------------------------------------------------------------- models whose routing is known


def test_a_router_by_token_id_is_known_by_it_and_by_nothing_else(mixed):
    low = np.arange(VOCAB) < VOCAB // 2
    model = told_by(mixture_of(models_of(), num_experts_per_tok=1), "embed_tokens.weight", np.where(low, 5.0, -5.0))
    found = routing_of(model, mixed)["ffn"]
    share = low[TokenArray(mixed["all"], "test").tokens[:-1]].mean()
    for layer in range(2):
        assert found["load"][layer] == pytest.approx([share, 1 - share, 0])
        assert found["dead"][layer] == ["law"]
        token = found["information"]["token"]
        assert token["measured"][layer] == pytest.approx(entropy([share, 1 - share]), abs=1e-9)
        assert max(token["control"][layer]) < token["measured"][layer] / 4
        position = found["information"]["position"]
        assert min(position["control"][layer]) < position["measured"][layer] < 1.2 * max(position["control"][layer])
        assert found["agreement"]["share"] == [1.0]
        assert found["agreement"]["independent"] == pytest.approx([share**2 + (1 - share) ** 2])
        for name, side in (("seed", low), ("code", ~low)):
            shown = found["examples"][layer][name]
            assert shown and all(side[one["id"]] and one["share"] == 1.0 for one in shown)
        assert found["examples"][layer]["law"] == []


def test_a_router_by_position_is_known_by_it_and_by_nothing_else(mixed):
    early = np.arange(64) < S // 2
    model = told_by(
        mixture_of(models_of("family/gpt2"), num_experts_per_tok=1), "wpe.weight", np.where(early, 5.0, -5.0)
    )
    found = routing_of(model, mixed)["ffn"]["information"]
    for layer in range(2):
        assert found["position"]["measured"][layer] == pytest.approx(math.log(2), abs=1e-3)  # the last window is cut
        assert max(found["position"]["control"][layer]) < 0.1
        control = found["token"]["control"][layer]
        assert np.mean(control) - 4 * np.std(control) < found["token"]["measured"][layer]
        assert found["token"]["measured"][layer] < np.mean(control) + 4 * np.std(control)


def test_a_router_by_domain_has_the_token_ids_of_its_domains_but_not_beyond_its_control(data):
    """Every window goes to one expert, so its rotation is the same: what ids tell is all by the domain."""
    oracle = mixture_of(models_of(), router="oracle", expert_sources=["seed", "code", "high"])
    found = routing_of(oracle, data)["ffn"]
    for layer in range(2):
        assert found["mutual_information"][layer] == pytest.approx(math.log(2))
        assert max(found["shuffled"][layer]) < math.log(2) / 3
        assert found["information"]["token"]["measured"][layer] > 0.5
        for one in found["information"].values():
            assert one is None or one["control"][layer] == [one["measured"][layer]] * ROTATIONS


def test_indifferent_soft_routers_are_seen_to_be_uniform(mixed):
    routers = [torch.zeros(3, 32)] * 2
    model = mixture_of(models_of(), routers, routers, attention="mixture", router="soft")
    routing = routing_of(model, mixed)
    for part in ("ffn", "attention"):
        found = routing[part]
        assert found["largest_gate"] == pytest.approx([1 / 3] * 2, abs=1e-6)
        assert found["mean_entropy"] == pytest.approx([math.log(3)] * 2, abs=1e-6)
        for name, bin_ in (("largest_gate", BINS // 3), ("entropy", BINS - 1)):
            assert found["histograms"][name] == [[float(bin_ == place) for place in range(BINS)]] * 2
        for one in ("token", "position"):
            assert max(found["information"][one]["measured"]) < 1e-9
        assert found["dead"] == [[], []]
    assert routing["agreement"] == {"by": "expert", "share": [1.0, 1.0], "independent": [1.0, 1.0]}


@pytest.mark.parametrize(("part", "choices"), [("attention", {}), ("ffn", {"router": "soft"})])
def test_sharp_soft_routers_are_seen_to_give_a_token_one_expert(mixed, part, choices):
    """By the token's parity: what the expert tells of the token is what the gates say, though every token has all experts."""
    model = told_by(
        mixture_of(models_of(), attention="mixture", **choices),
        "embed_tokens.weight",
        np.where(np.arange(VOCAB) % 2, 5.0, -5.0),
    )
    found = routing_of(model, mixed)[part]
    assert min(found["information"]["token"]["measured"]) > 0.6 and found["dead"] == [["law"], ["law"]]
    assert found["histograms"]["largest_gate"] == [[0.0] * (BINS - 1) + [1.0]] * 2
    assert found["histograms"]["entropy"] == [[1.0] + [0.0] * (BINS - 1)] * 2


def test_sides_that_follow_one_another_agree_and_opposed_ones_never_do(mixed):
    same = mixture_of(models_of(), attention="mixture", tie="sublayers", num_experts_per_tok=1)
    assert routing_of(same, mixed)["agreement"]["share"] == [1.0, 1.0]
    signs = np.where(np.arange(VOCAB) % 2, 5.0, -5.0)
    opposed = told_by(mixture_of(models_of(), attention="mixture", num_experts_per_tok=1), "embed_tokens.weight", signs)
    with torch.no_grad():
        for name, parameter in opposed.named_parameters():
            if name.endswith("mlp.router.weight"):
                parameter.neg_()
    odd = (TokenArray(mixed["all"], "test").tokens[:-1] % 2).mean()
    found = routing_of(opposed, mixed)["agreement"]
    assert found["share"] == [0.0, 0.0]
    assert found["independent"] == pytest.approx([2 * odd * (1 - odd)] * 2)


def test_shards_and_whole_experts_are_compared_by_source(mixed):
    """Feed-forward experts 0 and 1 are both the seed's, like attention expert 0."""
    choices = {"expert_sources": ["seed", "seed", "law"], "attention_experts": ["seed", "code", "law"]}
    model = mixture_of(models_of(), attention="mixture", num_experts_per_tok=1, **choices)
    model.config.experts = ["seed/1", "seed/2", "law"]
    told_by(model, "embed_tokens.weight", np.where(np.arange(VOCAB) % 2, 5.0, -5.0))
    odd = (TokenArray(mixed["all"], "test").tokens[:-1] % 2).mean()
    found = routing_of(model, mixed)["agreement"]  # attention: seed or code; feed-forward: seed's, always
    assert found["by"] == "source"
    assert found["share"] == pytest.approx([odd] * 2) and found["independent"] == pytest.approx([odd] * 2)


# -------------------------------------------------------------------------------------------------------- slow loops


def slow_information(weights: list[tuple[int, list[float]]]) -> float:
    """I(x; expert) of (x, weights over experts) pairs, one by one."""
    joint, by_x, by_expert, total = defaultdict(float), defaultdict(float), defaultdict(float), 0.0
    for x, row in weights:
        for expert, weight in enumerate(row):
            joint[x, expert] += weight
            by_x[x] += weight
            by_expert[expert] += weight
            total += weight
    return sum(w / total * math.log(w * total / (by_x[x] * by_expert[expert])) for (x, expert), w in joint.items() if w)


def slow_tokens(model, data, part: str, layer: int, stride: int | None = None) -> list[dict]:
    """Of every predicted token, window by window: its id, place, window, domain, gates, weights, entropy."""
    found, count = [], 0
    for domain, path in sorted(data.items()):
        draws = generator(1, domain).random((10_000, ROTATIONS))
        for number, (inputs, labels) in enumerate(windows(TokenArray(path, "test").tokens, S, stride)):
            trace = RoutingTrace()
            model(inputs[None], trace=trace)
            routing = trace.of(part)[layer]
            for place in range(S):
                if labels[place] < 0:
                    continue
                gates, taken = [0.0] * 3, [0.0] * 3
                for gate, expert in zip(routing.gates[place].tolist(), routing.experts[place].tolist(), strict=True):
                    gates[expert] += gate
                    taken[expert] += 1.0
                probabilities = routing.logits[place].double().softmax(0).tolist()
                by_gates = part == "attention" or model.config.router == "soft"
                weights = gates if by_gates else [one / sum(taken) for one in taken]
                found.append(
                    {"id": int(inputs[place]), "place": place, "window": count, "domain": domain, "gates": gates,
                     "weights": weights, "entropy": entropy(probabilities), "draws": draws[number]}
                )  # fmt: skip
            count += 1
    return found


def slow_rotated(tokens: list[dict], turn: int) -> list[list[float]]:
    """Everybody's weights, those of each window moved on by the places that were drawn for it."""
    moved = []
    for window in dict.fromkeys(one["window"] for one in tokens):
        inside = [one for one in tokens if one["window"] == window]
        shift = 1 + int(inside[0]["draws"][turn] * (len(inside) - 1)) if len(inside) > 1 else 0
        weights = [one["weights"] for one in inside]
        moved += weights[shift:] + weights[:shift]
    return moved


@pytest.mark.parametrize(
    ("part", "stride", "choices"),
    [("ffn", None, {}), ("attention", None, {}), ("ffn", 7, {}), ("ffn", None, {"router": "soft"})],
)
def test_every_figure_equals_a_loop_over_tokens(data, part, stride, choices):
    model = mixture_of(models_of(), attention="mixture", **choices)
    routing = routing_of(model, data, stride=stride)
    found = routing[part]
    every = [slow_tokens(model, data, part, layer, stride) for layer in range(2)]
    for layer, tokens in enumerate(every):
        load = np.mean([one["weights"] for one in tokens], axis=0)
        assert found["load"][layer] == pytest.approx(load, rel=1e-5)
        assert found["mean_entropy"][layer] == pytest.approx(np.mean([one["entropy"] for one in tokens]), rel=1e-5)
        assert found["largest_gate"][layer] == pytest.approx(np.mean([max(one["gates"]) for one in tokens]), rel=1e-5)
        for name, values in (
            ("largest_gate", [max(one["gates"]) for one in tokens]),
            ("entropy", [one["entropy"] / math.log(3) for one in tokens]),
        ):
            expected = Counter(min(int((value + 1e-6) * BINS), BINS - 1) for value in values)
            assert found["histograms"][name][layer] == pytest.approx([expected[b] / len(tokens) for b in range(BINS)])
        for trait, key in (("token", "id"), ("position", "place")):
            measured = found["information"][trait]
            pairs = [(one[key], one["weights"]) for one in tokens]
            assert measured["measured"][layer] == pytest.approx(slow_information(pairs), rel=1e-4, abs=1e-7)
            for turn in (0, ROTATIONS - 1):
                moved = zip([one[key] for one in tokens], slow_rotated(tokens, turn), strict=True)
                assert measured["control"][layer][turn] == pytest.approx(
                    slow_information(list(moved)), rel=1e-4, abs=1e-7
                )
        check_examples(found["examples"][layer], tokens, load)
    tops = [[one["gates"].index(max(one["gates"])) for one in tokens] for tokens in every]
    assert found["favoured"] == [pytest.approx([top.count(e) / len(top) for e in range(3)]) for top in tops]
    same = np.mean([a == b for a, b in zip(*tops, strict=True)])
    by_chance = sum(tops[0].count(e) * tops[1].count(e) for e in range(3)) / len(tops[0]) ** 2
    assert found["agreement"]["share"] == [pytest.approx(same)]
    assert found["agreement"]["independent"] == [pytest.approx(by_chance)]


def check_examples(shown: dict, tokens: list[dict], load) -> None:
    counts = Counter(one["id"] for one in tokens)
    for expert, name in enumerate(("seed", "code", "law")):
        lifts = {}
        for token, count in counts.items():
            rows = [one["weights"] for one in tokens if one["id"] == token]
            share = sum(row[expert] for row in rows) / sum(map(sum, rows))
            if count >= LEAST_TOKENS and share > load[expert]:
                lifts[token] = share / load[expert]
        best = sorted(lifts, key=lambda token: (-lifts[token], -counts[token], token))[:EXAMPLES]
        assert [one["id"] for one in shown[name]] == best
        assert [one["lift"] for one in shown[name]] == pytest.approx([lifts[token] for token in best], rel=1e-4)
        assert [one["count"] for one in shown[name]] == [counts[token] for token in best]


def same_figures(one, other) -> None:
    """Equal structure, and numbers to rounding: a batch of another size rounds sums otherwise."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same_figures(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same_figures(a, b)
    else:
        assert one == (pytest.approx(other, rel=1e-4, abs=1e-6) if isinstance(one, float) else other)


def test_batch_size_changes_no_figure(data):
    model = mixture_of(models_of(), attention="mixture")
    first = routing_of(model, data, batch_sequences=1)
    for size in (4, 7):
        same_figures(routing_of(model, data, batch_sequences=size), first)


class Halves:
    """A team of which the one rank adds what the other has counted."""

    def __init__(self, other: list[torch.Tensor]):
        self.other = iter(other)

    def add(self, tensor: torch.Tensor) -> None:
        tensor += next(self.other)


def random_decision(rng_seed: int, experts: int = 3, sequences: int = 6) -> Decided:
    drawn = torch.Generator().manual_seed(rng_seed)
    weights = torch.rand(2, sequences, S, experts, generator=drawn).softmax(-1)
    counted = torch.ones(sequences, S, dtype=torch.bool)
    counted[-1, 9:] = False
    return Decided(weights, weights, torch.rand(2, sequences, S, generator=drawn), counted)


def test_two_ranks_count_what_one_counts_to_the_bit():
    tokens = np.random.default_rng(0).integers(3, VOCAB, 6 * S - 6)
    config = mixture_of(models_of(), attention="mixture").config
    decided = {"ffn": random_decision(0), "attention": random_decision(1)}

    def microscope(*batches: slice) -> Microscope:
        scope = Microscope(config, Vocabulary(np.unique(tokens)), EvalConfig(sequence_length=S, rng_seed=3))
        scope.start("low", tokens)
        for batch in batches:
            part = {
                side: Decided(one.weights[:, batch], one.gates[:, batch], one.entropy[:, batch], one.counted[batch])
                for side, one in decided.items()
            }
            scope.add(part, batch.start)
        return scope

    alone = microscope(slice(0, 6))
    one, other = microscope(slice(0, 2), slice(4, 6)), microscope(slice(2, 4))
    tensors = [t for counts in other.counts.values() for t in counts.tensors()]
    one.combine(Halves([*tensors, other.sides_alike_L, *other.sides_favour.values()]))
    for part in ("ffn", "attention"):
        assert one.summary(part) == alone.summary(part)
    assert one.agreement_of_sides() == alone.agreement_of_sides()


# ---------------------------------------------------------------------------------------------------------- controls


def test_rare_ids_seem_informative_and_the_control_says_so():
    """Almost every token has an id of its own, and experts are drawn: much information, all of it bias."""
    rng, scope, windows_ = np.random.default_rng(0), None, 40
    tokens = rng.integers(0, 400, windows_ * S + 1)
    config = mixture_of(models_of(), num_experts_per_tok=1).config
    scope = Microscope(config, Vocabulary(np.unique(tokens)), EvalConfig(sequence_length=S))
    scope.start("low", tokens)
    chosen = torch.from_numpy(rng.integers(0, 3, (2, windows_, S)))
    gates = torch.nn.functional.one_hot(chosen, 3).float()
    counted = torch.ones(windows_, S, dtype=torch.bool)
    scope.add({"ffn": Decided(gates, gates, torch.zeros(2, windows_, S), counted)}, 0)
    for trait, least in (("token", 0.4), ("position", 0.005)):
        found = scope.summary("ffn")["information"][trait]
        for measured, control in zip(found["measured"], found["control"], strict=True):
            assert measured > least and abs(measured - np.mean(control)) < 4 * np.std(control)


def test_information_of_known_tables():
    assert information(np.eye(4)) == pytest.approx(math.log(4))
    assert information(np.diag([1.0, 3.0])) == pytest.approx(entropy([0.25, 0.75]))
    assert information(np.outer([1, 5, 2], [3, 1])) == pytest.approx(0, abs=1e-12)
    assert information(np.zeros((2, 2))) == 0


def test_rounding_below_an_edge_does_not_change_the_bin():
    values = torch.tensor([[0.0, 0.25 - 1e-8, 0.2499, 1.0, 4.0]], dtype=torch.float64)
    expected = [0] * BINS
    for place, count in ((0, 1), (4, 1), (5, 1), (BINS - 1, 2)):
        expected[place] = count
    assert binned(values).tolist() == [expected]


def test_an_expert_is_dead_below_a_tenth_of_an_equal_share(mixed):
    """Of three experts: code has more than a thirtieth of the tokens, and less than a tenth; law has none."""
    few = np.isin(np.arange(VOCAB), (3, 4, 5, 6))
    model = told_by(mixture_of(models_of(), num_experts_per_tok=1), "embed_tokens.weight", np.where(few, -5.0, 5.0))
    found = routing_of(model, mixed)["ffn"]
    assert 1 / 30 < found["load"][0][1] < 1 / 10 and found["dead"] == [["law"]] * 2


def test_typical_tokens_are_frequent_and_above_the_experts_share():
    """Ids 0 and 1 come often, 2 too seldom; expert 0 has the most of 1, and less than its share of 0."""
    tokens = np.array([0] * 30 + [1] * 30 + [2] * 3 + [0])
    config = mixture_of(models_of(), num_experts_per_tok=1).config
    scope = Microscope(config, Vocabulary(np.arange(3)), EvalConfig(sequence_length=63))
    scope.start("low", tokens)
    first = torch.tensor([0.25, 0.75, 1.0])[torch.from_numpy(tokens[:-1])]
    gates = torch.stack([first, 1 - first, torch.zeros(63)], -1).expand(2, 1, 63, 3)
    counted = torch.ones(1, 63, dtype=torch.bool)
    scope.add({"ffn": Decided(gates, gates, torch.zeros(2, 1, 63), counted)}, 0)
    share = (30 * 0.25 + 30 * 0.75 + 3) / 63
    for shown in scope.summary("ffn")["examples"]:
        assert [one["id"] for one in shown["seed"]] == [1] and [one["id"] for one in shown["code"]] == [0]
        assert shown["seed"][0] == {
            "id": 1,
            "text": None,
            "count": 30,
            "share": 0.75,
            "lift": pytest.approx(0.75 / share),
        }
        assert shown["law"] == []


# ------------------------------------------------------------------------------------------------------------- words


def test_parts_of_words_follow_the_rule():
    texts = ["The", " cat", "s", " (", "foo", "_", "bar", "\n", "ing", "  ", "<eos>", "7", "é", "�"]
    special = [text == "<eos>" for text in texts]
    stream = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 11, 11, 10, 2, 12, 13, 2]
    expected = [
        STARTS, STARTS, CONTINUES, NEITHER, STARTS, NEITHER, STARTS, NEITHER, STARTS, NEITHER, STARTS, CONTINUES,
        CONTINUES, NEITHER, STARTS, CONTINUES, NEITHER, STARTS,
    ]  # fmt: skip
    assert parts_of_words(np.array(stream), texts, special).tolist() == expected


def test_texts_of_byte_level_and_of_sentencepiece_tokens():
    byte_level = Tokenizer(models.BPE(vocab={"Ġ": 0, "a": 1, "Ġa": 2, "Ċ": 3, "Ã": 4}, merges=[("Ġ", "a")]))
    byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    assert token_texts(PreTrainedTokenizerFast(tokenizer_object=byte_level), [2, 1, 3, 4]) == [" a", "a", "\n", "�"]
    pieces = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "▁a": 2, "<0x0A>": 3}, merges=[("▁", "a")]))
    pieces.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    assert token_texts(PreTrainedTokenizerFast(tokenizer_object=pieces), [2, 1, 0, 3]) == [" a", "a", " ", "\n"]


class Letters:
    """A tokenizer of sorts: ids below half of the vocabulary start words, the rest continue them."""

    all_special_ids = [EOS]

    def convert_ids_to_tokens(self, ids):
        return [f"▁a{one}" if one < VOCAB // 2 else f"a{one}" for one in ids]

    def decode(self, ids):
        return f"a{ids[0]}"


def test_a_router_by_part_of_word_is_known_by_it(mixed):
    low = np.arange(VOCAB) < VOCAB // 2
    model = told_by(mixture_of(models_of(), num_experts_per_tok=1), "embed_tokens.weight", np.where(low, 5.0, -5.0))
    config = EvalConfig(sequence_length=S, batch_sequences=4)
    found = evaluate(model, mixed, config, ignore, tokenizer=Letters())[0]["routing"]["ffn"]
    tokens = TokenArray(mixed["all"], "test").tokens[:-1]
    signs, starts = tokens == EOS, low[tokens] & (tokens != EOS)
    after_sign = np.concatenate([[True], signs[:-1]])
    parts = np.where(signs, NEITHER, np.where(starts | after_sign, STARTS, CONTINUES))
    weights = [
        (int(part), [float(low[token]), float(not low[token])]) for part, token in zip(parts, tokens, strict=True)
    ]
    measured = found["information"]["word"]
    assert measured["measured"] == pytest.approx([slow_information(weights)] * 2, abs=1e-6)
    assert max(map(max, measured["control"])) < measured["measured"][0] / 10
    assert found["examples"][0]["seed"][0]["text"].startswith(" a")
