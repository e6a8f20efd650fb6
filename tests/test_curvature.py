"""Curvature: statistics of a tiny model against autograd, exact enumeration of labels and exact Hessians."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tests import reference
from tests.domains import write_tokens
from tests.tiny import dense_models
from upcycle.batches import Batches
from upcycle.config import CurvatureConfig
from upcycle.curvature import linears, measure, sampled_labels, signs, write_statistics
from upcycle.curvature_report import compare_diagonals, compare_error, error_in_words, in_words
from upcycle.merger import Statistics
from upcycle.roles import TensorFacts, tensor_facts
from upcycle.team import Team

S = 6
KINDS = ("fisher", "gram", "kfac", "hessian")
SEEN = ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return {"low": write_tokens(tmp_path_factory.mktemp("domain") / "low", rng_seed=1)}


@pytest.fixture(scope="module")
def one_window(tmp_path_factory):
    """A domain with a single window: every sequence is the same, and only the random numbers differ."""
    root = tmp_path_factory.mktemp("one")
    for part, values in (("tokens", np.arange(3, 3 + S)), ("offsets", [0, S]), ("bytes", [S])):
        np.save(root / f"train.{part}.npy", np.asarray(values))
    return {"low": root}


def model_of(kind="llama"):
    return dense_models(kind, 1, dtype=torch.float32)[0]


def batches_of(data, rng_seed=1):
    return Batches(data, {"low": 1.0}, S, 1, rng_seed, max_epochs=1e9)


def measured(tmp_path, data, model=None, team=None, **changes):
    config = CurvatureConfig(**dict(sequences=3, sequence_length=S, kinds=KINDS) | changes)
    scratch = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    scratch.mkdir()
    more = {} if team is None else {"team": team}
    found = measure(model or model_of(), batches_of(data), config, scratch, **more)
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "family/gpt2"])
def test_observed_labels_and_inputs_equal_autograd(tmp_path, data, kind):
    model = model_of(kind)
    found = measured(tmp_path, data, model, labels="observed", kinds=("fisher", "gram", "kfac"))
    fisher, gram, factors = reference.curvature(
        model.double(), [batches_of(data).batch(n)[0].tolist() for n in range(3)]
    )
    assert {n.removeprefix("fisher/") for n in found if n.startswith("fisher/")} == set(fisher)
    for name, expected in fisher.items():
        torch.testing.assert_close(found[f"fisher/{name}"].double(), expected, rtol=2e-3, atol=1e-6, msg=name)
    assert len(gram) == sum(1 for _ in linears(model, 10**6)) > 3
    for name, expected in gram.items():
        torch.testing.assert_close(found[f"gram/{name}"].double(), expected, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(found[f"kfac_in/{name}"], found[f"gram/{name}"])
        torch.testing.assert_close(found[f"kfac_out/{name}"].double(), factors[name], rtol=2e-3, atol=1e-6, msg=name)


def spread(tmp_path, data, chunks, exact, **changes):
    """How many standard errors the mean of `chunks` measurements lies from `exact`, entry by entry, and that mean."""
    every = [measured(tmp_path, data, rng_seed=seed, **changes) for seed in range(chunks)]
    for name, expected in exact.items():
        stacked = torch.stack([found[name].double() for found in every])
        mean, error = stacked.mean(0), stacked.std(0) / chunks**0.5
        yield name, (mean - expected).abs() / error.clamp_min(1e-12), mean


@pytest.mark.slow
def test_sampled_labels_are_the_fisher_within_three_standard_errors(tmp_path, one_window):
    """Against all labels enumerated, each weighed by its probability; and the observed ones are far away."""
    model = model_of()
    exact, _, factors = reference.curvature(model.double(), [list(range(3, 3 + S))], enumerated=True)
    wanted = {f"fisher/{name}": exact[name] for name in SEEN} | {f"kfac_out/{SEEN[0]}": factors[SEEN[0]]}
    for name, errors, mean in spread(tmp_path, one_window, 20, wanted, sequences=25, kinds=("fisher", "kfac")):
        assert (errors < 3).double().mean() > 0.97, name
        assert mean.sum() == pytest.approx(float(wanted[name].sum()), rel=0.1)
    observed = measured(tmp_path, one_window, labels="observed", kinds=("fisher",))
    assert abs(observed[f"fisher/{SEEN[0]}"].sum() / exact[SEEN[0]].sum() - 1) > 0.2


@pytest.mark.slow
def test_probes_find_the_diagonal_of_the_hessian_within_three_standard_errors(tmp_path, one_window):
    exact = reference.hessian_diagonal(model_of().double(), list(range(3, 3 + S)), (SEEN[2], SEEN[0]))
    assert min(tensor.min() for tensor in exact.values()) < 0  # no Fisher has that
    wanted = {f"hessian/{name}": tensor for name, tensor in exact.items()}
    for name, errors, _ in spread(tmp_path, one_window, 20, wanted, sequences=20, kinds=("hessian",)):
        assert (errors < 3).double().mean() > 0.97, name


def test_two_ranks_measure_what_one_does(tmp_path, data):
    class Half(Team):
        def add(self, tensor):
            pass

    whole = measured(tmp_path, data, sequences=4)
    halves = [measured(tmp_path, data, sequences=4, team=Half(rank=rank, size=2)) for rank in range(2)]
    assert set(whole) == set(halves[0])
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    again = measured(tmp_path, data, sequences=4, rng_seed=2)
    assert not torch.equal(again[f"fisher/{SEEN[0]}"], whole[f"fisher/{SEEN[0]}"])
    torch.testing.assert_close(again[f"gram/{SEEN[0]}"], whole[f"gram/{SEEN[0]}"])


def test_large_linears_and_embeddings_have_no_factors(tmp_path, data):
    model = model_of()
    named = {name: (inside, outside) for name, _, inside, outside in linears(model, 10**6)}
    assert named[SEEN[1]] == (model.config.intermediate_size, model.config.hidden_size)
    found = measured(tmp_path, data, kinds=("gram",), largest_factor=model.config.hidden_size)
    small = {name for name, sizes in named.items() if max(sizes) <= model.config.hidden_size}
    assert {name.removeprefix("gram/") for name in found} == small < set(named)
    for tied in (False, True):
        gpt2 = dense_models("family/gpt2", 1, tie_word_embeddings=tied)[0]
        assert ("lm_head.weight" in [name for name, *_ in linears(gpt2, 10**6)]) != tied


def test_draws_follow_the_probabilities_and_signs_are_fair():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().repeat(3000, 1)
    counts = sampled_labels(logits, 5, 0).bincount(minlength=3) / 3000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.7]), atol=0.03, rtol=0)
    probe = signs(torch.Size([50, 41]), 5, 0)
    assert set(probe.unique().tolist()) == {-1.0, 1.0} and abs(probe.mean()) < 0.08
    assert not torch.equal(probe, signs(torch.Size([50, 41]), 5, 1))


def test_batches_of_several_sequences_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match="single sequences, got batches of 2"):
        measure(model_of(), Batches(data, {"low": 1.0}, S, 2, 1), CurvatureConfig(sequence_length=S), tmp_path)


def test_two_estimates_of_one_diagonal_side_by_side(tmp_path, data):
    """Each figure against numpy's and scipy's on the whole tensors; the model's own losses make the Hessian's negative in part."""
    model = model_of()
    found = measured(tmp_path, data, model, kinds=("fisher", "hessian"), sequences=20)
    directories = {}
    for kind in ("fisher", "hessian"):
        directories[kind] = tmp_path / kind
        directories[kind].mkdir()
        some = {name: tensor for name, tensor in found.items() if name.startswith(kind)}
        write_statistics(some, CurvatureConfig(kinds=(kind,)), {"low": 20 * S}, directories[kind])
    fisher, hessian = (Statistics(path) for path in directories.values())
    norm = fisher.of(("fisher_norm",), "any")["fisher_norm"]
    both = {
        kind: {name.split("/")[1]: tensor.double().numpy() for name, tensor in found.items() if name.startswith(kind)}
        for kind in ("fisher", "hessian")
    }
    every = {kind: np.concatenate([one.ravel() for one in tensors.values()]) for kind, tensors in both.items()}
    assert norm.item() == pytest.approx(np.linalg.norm(every["fisher"]), rel=1e-6)
    report = compare_diagonals(fisher, hessian, tensor_facts(model.config))
    assert set(report) == {"attention", "mlp", "norm", "embedding", "head", "all"}
    whole = report["all"]
    assert (
        whole["entries"] == len(every["fisher"]) == sum(row["entries"] for role, row in report.items() if role != "all")
    )
    assert whole["trace"] == pytest.approx({kind: values.sum() for kind, values in every.items()}, rel=1e-6)
    assert whole["below_0"] == (every["hessian"] < 0).mean() > 0
    assert whole["rank_correlation"] == pytest.approx(spearmanr(every["fisher"], every["hessian"]).statistic)
    assert len(in_words(report)) == 1 + len(report)
    with pytest.raises(ValueError, match="the two estimates are of different tensors"):
        compare_diagonals(fisher, fisher, tensor_facts(model.config))


def test_the_gradient_is_that_of_the_text(tmp_path, data):
    model = model_of()
    found = measured(tmp_path, data, model, labels="observed", kinds=("gradient",))
    expected = reference.mean_gradient(model.double(), [batches_of(data).batch(n)[0].tolist() for n in range(3)])
    assert {name.removeprefix("gradient/") for name in found} == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"gradient/{name}"].double(), gradient, rtol=2e-3, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="kinds=gradient with labels=sampled is 0 on average; write labels=observed"):
        CurvatureConfig(kinds=("gradient",))


def test_task_arithmetic_errs_as_predicted_where_losses_are_quadratic(tmp_path):
    """And not where the target is another point. Losses ½ (θ − m_i)² H_i; each branch, and the target with Σ α of them, is at the
    minimum of its loss and the pull ½ (θ − θ_0)² H_0 towards the seed."""
    scale, shapes, names = 0.4, {"a.weight": (3, 4), "b.weight": (5,)}, ("seed", "code", "law")
    facts = {"a.weight": TensorFacts("mlp", 0), "b.weight": TensorFacts("norm", 0)}
    g = torch.Generator().manual_seed(0)
    lowest = {who: {name: torch.randn(shape, generator=g) for name, shape in shapes.items()} for who in names}
    hessian = {who: {name: torch.rand(shape, generator=g) + 0.5 for name, shape in shapes.items()} for who in names}

    def minimum(name: str, weights: dict[str, float]) -> torch.Tensor:
        above = sum(w * hessian[who][name] * lowest[who][name] for who, w in weights.items())
        return above / sum(w * hessian[who][name] for who, w in weights.items())

    theta = {who: {name: minimum(name, {"seed": 1.0, who: 1.0}) for name in shapes} for who in names}
    target = {name: minimum(name, {"seed": 1.0, "code": scale, "law": scale}) for name in shapes}

    def statistics(kind: str, place: str, tensors: dict) -> Statistics:
        (tmp_path / place).mkdir()
        config = CurvatureConfig(kinds=(kind,), labels="observed")
        write_statistics({f"{kind}/{name}": tensor for name, tensor in tensors.items()}, config, {}, tmp_path / place)
        return Statistics(tmp_path / place)

    class Model(dict):  # as much of a checkpoint as is asked for
        get = dict.__getitem__

    def report(at: dict, place: str) -> dict:
        gradients = {}
        for who in names[1:]:
            both = [{n: hessian[who][n] * (where[n] - lowest[who][n]) for n in shapes} for where in (at, theta[who])]
            gradients[who] = tuple(statistics("gradient", f"{place}-{who}-{n}", one) for n, one in enumerate(both))
        fisher = statistics("fisher", f"{place}-fisher", hessian["seed"])
        return compare_error({who: Model(theta[who]) for who in names}, Model(at), fisher, gradients, scale, facts)

    found = report(target, "minimum")
    assert set(found) == {"mlp", "norm", "all"} and list(found["all"]) == ["1e-12", "0.01", "1"]
    for role in found.values():
        row = role["1e-12"]
        assert row["cosine"] == pytest.approx(1, abs=1e-5) and row["predicted"] == pytest.approx(
            row["measured"], rel=1e-4
        )
    elsewhere = report({name: -3 * tensor for name, tensor in target.items()}, "elsewhere")["all"]["1e-12"]
    assert abs(elsewhere["predicted"] / elsewhere["measured"] - 1) > 0.05
    assert len(error_in_words(found)) == 1 + 3 * 3


def test_fewer_sequences_than_ranks_are_refused(tmp_path, data):
    with pytest.raises(
        ValueError, match="sequences=1 is fewer than the 2 processes that share them; raise curvature.sequences"
    ):
        measured(tmp_path, data, sequences=1, team=Team(0, 2, "ddp"))


def test_linears_without_the_batchs_axis_are_seen_whole(tmp_path, data):
    """OPT's feed-forwards take (positions, features)."""
    from transformers import OPTConfig, OPTForCausalLM

    from tests.tiny import VOCAB

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    model = OPTForCausalLM(OPTConfig(vocab_size=VOCAB, max_position_embeddings=32, dropout=0.0, **sizes)).eval()
    found = measured(tmp_path, data, model, labels="observed", kinds=("gram", "kfac"))
    layer, seen = model.model.decoder.layers[0], {}
    for part in ("fc1", "fc2"):
        getattr(layer, part).register_forward_pre_hook(
            lambda _m, args, part=part: seen.setdefault(part, []).append(args[0])
        )
    for number in range(3):
        model(torch.from_numpy(batches_of(data).batch(number)))
    for part, sizes in (("fc1", (16, 24)), ("fc2", (24, 16))):
        name, rows = f"model.decoder.layers.0.{part}.weight", [one[:-1] for one in seen[part]]
        assert rows[0].shape == (S - 1, sizes[0])
        expected = sum(one.T @ one for one in rows) / (3 * (S - 1))
        torch.testing.assert_close(found[f"gram/{name}"], expected.detach(), rtol=1e-4, atol=1e-6)
        assert found[f"kfac_out/{name}"].shape == (sizes[1], sizes[1])
