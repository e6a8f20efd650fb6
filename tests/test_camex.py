"""CAMEx as a layer: against loops with written-out Kronecker products, its identities, and where it must be refused."""

from __future__ import annotations

import itertools

import pytest
import reference
import tiny
import torch

from upcycle import soft_merging
from upcycle.camex import elected
from upcycle.configuration import UpcycledConfig
from upcycle.kronecker import factor_pair
from upcycle.kronecker_map import apply_map, start
from upcycle.modeling import UpcycledForCausalLM
from upcycle.router import RoutingTrace
from upcycle.soft_merging import Runs, merged_linear

EXPERTS = ["code", "law", "math"]
FORMS: dict[str, dict] = {
    "soft_merging": {},
    "domain": {"base": "code"},
    "ca": {"base": "seed", "curvature": "kronecker"},
    "rank_3": {"base": "mean", "curvature": "kronecker", "rank": 3},
    "linear": {"base": "seed", "curvature": "linear"},
    "ties": {"base": "seed", "curvature": "kronecker", "election": "sign"},
    "alpha": {"base": "zeros", "curvature": "kronecker", "alpha": 0.8},
    "shared": {"base": "seed", "curvature": "kronecker", "share": "all", "rank": 2},
    "fixed_base": {"base": "seed", "train_base": False, "curvature": "kronecker"},
    "travel": {"base": "seed", "curvature": "kronecker", "update": "travel", "alpha": 0.9},
    "travel_zeros": {"base": "zeros", "curvature": "linear", "update": "travel"},
    "previous": {"base": "seed", "curvature": "kronecker", "update": "previous_merged", "election": "sign"},
    "per_layer": {"base": "mean", "curvature": "kronecker", "update": "per_layer", "rank": 2},
}


def has_first_base(form: dict) -> bool:
    return form.get("base", "none") not in ("none", "zeros") and form.get("update") not in ("travel", "previous_merged")


def mixture_of(form: dict, kind: str = "llama", dtype=torch.float64, at_start: bool = False, **options):
    """A mixture of three routed experts with random weights; unless `at_start`, the curvature has moved from I."""
    rule = {"per": "segment", "tokens": 3, "first": "base" if has_first_base(form) else "uniform"} | options
    config = UpcycledConfig(
        seed=tiny.dense_config(kind).to_dict(),
        experts=EXPERTS,
        router="soft",
        router_options=rule,
        combine={"of": "weights", **form},
    )
    model = UpcycledForCausalLM._from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if "inv_freq" in name or (at_start and "curvature_" in name):
                continue
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            tensor.add_(0.2 * drawn) if "curvature_" in name else tensor.copy_(
                (0.5 if "router" in name else 0.2) * drawn
            )
    return model.eval()


def layers_of(model) -> list:
    return [module for module in model.modules() if type(module).__name__ == "RoutedExperts"]


def maps_of(model, layer, side: str, place: int):
    """The maps of one matrix of all experts, written out; None without a curvature."""
    shared = model.model.curvature
    own = dict((shared if shared is not None else layer.experts).named_parameters(recurse=False))
    factors = {name.split("_")[2]: one for name, one in own.items() if name.startswith(f"curvature_{side}_")}
    if not factors:
        return None
    if "linear" in factors:
        linear = factors["linear"]
        rows = {"up": layer.experts.shapes["down_proj"][2], "down": layer.experts.shapes["down_proj"][1]}[side]
        return [torch.kron(torch.eye(rows, dtype=linear.dtype), linear[e, place]) for e in range(len(EXPERTS))]
    return [
        reference.kronecker_map(
            [[factors[f][e, place, r] for f in ("out1", "out2", "in1", "in2")] for r in range(factors["out1"].shape[2])]
        )
        for e in range(len(EXPERTS))
    ]


class Twin:
    """The layers one after the other, in loops: the base of each, the differences, and every token's merged feed-forward."""

    def __init__(self, model):
        self.model, self.layers = model, layers_of(model)
        self.combine, self.maps = model.config.combine, {}

    def matrices(self, layer, name: str) -> list[tuple[str, int, slice]]:
        """(side, which matrix of the tensor, its rows)."""
        rows = layer.experts.shapes[name][1]
        if name.startswith("gate_up"):
            return [("up", 0, slice(0, rows // 2)), ("up", 1, slice(rows // 2, rows))]
        return [("down" if name.startswith("down") else "up", 0, slice(0, rows))]

    def differences(self, layer, name: str, base) -> list[torch.Tensor]:
        stacked, parts = getattr(layer.experts, name), []
        for side, place, rows in self.matrices(layer, name):
            bias = name.endswith("bias")
            key = (layer, side, place)
            if key not in self.maps:
                self.maps[key] = maps_of(self.model, layer, side, place)
            maps = None if bias else self.maps[key]
            election = self.combine["election"] == "sign" and not bias
            own = [one[rows] for one in stacked]
            parts.append(reference.camex_differences(own, base[rows], maps, self.combine["alpha"], election))
        return [torch.cat(of_one) for of_one in zip(*parts, strict=True)]

    def run(self, hiddens, routings) -> list[torch.Tensor]:
        """routings: as the routers decided, a layer each."""
        update, outs, bases = self.combine["update"], [], None
        for place, (layer, hidden, routing) in enumerate(zip(self.layers, hiddens, routings, strict=True)):
            experts, tokens = layer.experts, hidden.flatten(0, 1)
            own = {
                name: getattr(experts, f"base_{name}")
                if experts.has_base
                else torch.zeros_like(getattr(experts, name)[0])
                for name in experts.shapes
            }
            received = place > 0 and update in ("travel", "previous_merged")
            per_token = bases if received else [own] * len(tokens)
            out, following = [], []
            for t, x in enumerate(tokens):
                weights, after = {}, {}
                for name in experts.shapes:
                    base = per_token[t][name]
                    delta = self.differences(layer, name, base)
                    if update == "per_layer":
                        base = reference.camex_updated(base, delta)
                        delta = self.differences(layer, name, base)
                    weights[name] = reference.camex_merged(base, delta, list(routing.gates[t].to(base.dtype)))
                    after[name] = reference.camex_updated(base, delta) if update == "travel" else weights[name]
                following.append(after)
                out.append(self.feed_forward(experts, weights, x))
            outs.append(torch.stack(out).view(hidden.shape))
            bases = following
        return outs

    def feed_forward(self, experts, weights, x):
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        h = weights[first] @ x + weights.get(f"{first}_bias", 0)
        if experts.has_gate:
            h = experts.act_fn(h[: len(h) // 2]) * h[len(h) // 2 :]
        else:
            h = experts.act_fn(h)
        return weights["down_proj"] @ h + weights.get("down_proj_bias", 0)


def run_layers(model, hiddens, valid=None):
    """Every layer's experts on given hidden states, with one trace: (outputs, decisions)."""
    trace = RoutingTrace()
    trace.valid_BS = valid
    if model.model.curvature is not None:
        trace.curvature = model.model.curvature()
    outs = []
    for layer, hidden in zip(layers_of(model), hiddens, strict=True):
        layer.trace = trace
        outs.append(layer(hidden))
        layer.trace = None
    return outs, trace.of("ffn")


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("name", FORMS)
def test_outputs_and_gradients_equal_loops_with_written_out_kronecker_products(name, kind):
    model = mixture_of(FORMS[name], kind)
    assert len(layers_of(model)) == 2
    generator = torch.Generator().manual_seed(1)
    hiddens = [torch.randn(2, 8, 32, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, :2] = False
    ours, routings = run_layers(model, hiddens, valid)
    theirs = Twin(model).run(hiddens, routings)
    weights = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in ours]
    wanted = {n: p for n, p in model.named_parameters() if ".experts." in n or "curvature" in n or ".router." in n}
    inputs = [*wanted.values(), *hiddens]

    def gradients(outs):
        total = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
        return torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)

    for out, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for which, found, expected in zip([*wanted, "x0", "x1"], gradients(ours), gradients(theirs), strict=True):
        assert found is not None and expected is not None, which
        near = 1e-9 if "experts" in which or "curvature" in which else 1e-5  # through gates, which are fp32
        torch.testing.assert_close(
            found,
            expected,
            rtol=near,
            atol=near * max(expected.abs().max().item(), 1e-3),
            msg=lambda said, which=which: f"{which}: {said}",
        )
        # Biases have M = I, with which an update of its own leaves nothing of a layer's base: B + mean(E − B).
        assert found.abs().max() > 1e-9 or (name == "per_layer" and which.endswith("bias")), which


@pytest.mark.parametrize("name", FORMS)
def test_gradient_checkpointing_and_generation_change_nothing_and_no_token_sees_later_ones(name):
    model = mixture_of(FORMS[name])
    ids = tiny.tokens(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        for place in range(1, 9):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 1) % tiny.VOCAB
            again = model(changed).logits
            assert torch.equal(again[:, :place], logits[:, :place])
            assert not torch.equal(again[:, place:], logits[:, place:])
    cached = model.generate(ids, max_new_tokens=7, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=7, do_sample=False, use_cache=False))
    model.train()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return tiny.gradients_of(model)

    expected = gradients()
    model.activation_checkpointing_enable()
    tiny.assert_same_tensors(gradients(), expected)


def test_the_map_starts_as_the_identity_and_no_two_of_its_terms_learn_alike():
    generator = torch.Generator().manual_seed(0)
    tau = torch.randn(2, 12, 30, dtype=torch.float64)
    for rank in (1, 2, 3):
        sizes = (*factor_pair(12), *factor_pair(30))
        factors = {
            name: start(f"curvature_up_{name}", (2, 1, rank, size, size), generator).double().requires_grad_()
            for name, size in zip(("out1", "out2", "in1", "in2"), sizes, strict=True)
        }
        assert torch.equal(apply_map(factors, tau), tau)
        optimizer = torch.optim.Adam(factors.values(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (
                apply_map(factors, tau)
                * torch.randn(tau.shape, generator=torch.Generator().manual_seed(1), dtype=tau.dtype)
            ).sum().backward()
            optimizer.step()
        for one, other in itertools.combinations(range(rank), 2):
            a, b = ([factors[name][:, :, r] for name in factors] for r in (one, other))
            assert not any(torch.allclose(x, y, atol=1e-3) for x, y in zip(a, b, strict=True))


def test_r_equal_terms_of_a_share_each_stay_equal_so_that_their_rank_is_one():
    """Why `start` differs from I/R a term, which the paper's description suggests."""
    eyes = [torch.eye(n, dtype=torch.float64).expand(1, 1, 3, n, n).clone() for n in (3, 4, 5, 6)]
    eyes[0] /= 3
    factors = {name: one.requires_grad_() for name, one in zip(("out1", "out2", "in1", "in2"), eyes, strict=True)}
    tau = torch.randn(1, 12, 30, dtype=torch.float64)
    assert torch.allclose(apply_map(factors, tau), tau)
    optimizer = torch.optim.Adam(factors.values(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        (apply_map(factors, tau) - torch.randn_like(tau)).square().sum().backward()
        optimizer.step()
    for one in factors.values():
        assert torch.allclose(one[:, :, 0], one[:, :, 1], atol=1e-9) and torch.allclose(
            one[:, :, 0], one[:, :, 2], atol=1e-9
        )


def test_factors_are_the_pair_nearest_the_square_root():
    assert [factor_pair(n) for n in (768, 192, 512, 36, 7)] == [(24, 32), (12, 16), (16, 32), (6, 6), (1, 7)]
    with pytest.raises(ValueError, match=r"1021 splits into 1 × 1021 at best.*at most 512"):
        factor_pair(1021)


def test_signs_are_elected_by_the_sum_of_the_differences():
    tau = torch.tensor([[[1.0, -2.0, 0.0, 1.0]], [[2.0, 1.0, 3.0, -1.0]]])
    assert elected(tau).tolist() == [[[1.0, -2.0, 0.0, 0.0]], [[2.0, 0.0, 3.0, 0.0]]]


@pytest.mark.parametrize("update", ["none", "travel", "previous_merged", "per_layer"])
def test_without_a_curvature_moved_the_base_cancels_and_soft_merging_is_left(update):
    """α = 1, M = I, scores that sum to 1: Ê = Σ s E, whatever the base is and does."""
    form = {"base": "seed", "curvature": "kronecker", "rank": 2, "update": update}
    bent, plain = mixture_of(form, at_start=True, first="uniform"), mixture_of({}, first="uniform")
    plain.load_state_dict({name: tensor for name, tensor in bent.state_dict().items() if name in plain.state_dict()})
    ids = tiny.tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(
            bent(ids).logits, plain(ids).logits, rtol=1e-6, atol=1e-6
        )  # fp32 scores sum to 1 so far


def test_differences_that_are_0_teach_no_curvature():
    model = mixture_of({"base": "seed", "curvature": "kronecker"})
    with torch.no_grad():
        for layer in layers_of(model):
            for name in layer.experts.shapes:
                getattr(layer.experts, name).copy_(getattr(layer.experts, f"base_{name}"))
    model.train()
    ids = tiny.tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if "curvature_" in name}
    assert found and all(grad.abs().max() == 0 for grad in found.values())


def test_dropped_differences_are_rescaled_in_training_and_whole_in_evaluation():
    model, plain = mixture_of({"base": "seed", "drop": 0.5}), mixture_of({"base": "seed"})
    plain.load_state_dict(model.state_dict())
    ids = tiny.tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        experts = layers_of(model.train())[0].experts
        (base, _), tau = experts.stored(), layers_of(plain)[0].experts.weights(RoutingTrace())[1]["down_proj"]
        torch.manual_seed(0)
        draws = torch.stack([experts.bent(base, RoutingTrace())["down_proj"] for _ in range(400)])
    kept = draws != 0
    assert 0.45 < kept.double().mean() < 0.55
    torch.testing.assert_close(draws[kept], (2 * tau).expand_as(draws)[kept])


@pytest.mark.parametrize("per_chunk", [1, 2, 100])
def test_merged_linears_have_the_gradients_of_the_plain_formula_in_any_chunks(per_chunk, monkeypatch):
    monkeypatch.setattr(soft_merging, "CHUNK_BYTES", per_chunk * 6 * 4 * 8)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, gates, base, delta, bias = drawn(5, 3, 4), drawn(5, 2), drawn(6, 4), drawn(2, 6, 4), drawn(5, 6)
    assert torch.autograd.gradcheck(merged_linear, (x, gates, base, delta, bias))
    assert torch.autograd.gradcheck(lambda x, gates, delta: merged_linear(x, gates, None, delta), (x, gates, delta))
    expected = torch.einsum("nli,noi->nlo", x, base + torch.einsum("ne,eoi->noi", gates, delta)) + bias[:, None]
    torch.testing.assert_close(merged_linear(x, gates, base, delta, bias), expected)
    frozen = merged_linear(x, gates, base.detach(), delta.detach())
    assert torch.equal(
        *(torch.autograd.grad(one.sum(), gates)[0] for one in (frozen, merged_linear(x, gates, base, delta)))
    )


def test_runs_of_unequal_length_come_back_as_they_were():
    runs = Runs(torch.tensor([4, 4, 7, 9, 9, 9]))
    x = torch.arange(12.0).view(6, 2)
    block = runs.block(x)
    assert block.shape == (3, 3, 2) and block[1].tolist() == [[4, 5], [0, 0], [0, 0]]
    assert torch.equal(runs.tokens(block), x)
    assert torch.equal(Runs(torch.tensor([1, 1, 2, 2])).block(x[:4]), x[:4].view(2, 2, 2))


def test_weights_that_are_never_trained_are_buffers_and_a_curvature_does_not_decay():
    from upcycle.optim import decays, group_of

    model = mixture_of(FORMS["fixed_base"])
    names = dict(model.named_parameters())
    assert not any("base_" in name for name in names)
    assert any("base_" in name for name, _ in model.named_buffers())
    curved = [name for name in names if "curvature_" in name]
    assert curved and all(group_of(name) == "curvature" and not decays(name, names[name]) for name in curved)


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_an_expert_that_is_removed_leaves_no_trace(name):
    model, ids = mixture_of(FORMS[name]), tiny.tokens(2, 9)
    before = model(ids, trace=RoutingTrace(removed={"ffn": 1})).logits
    whole = model(ids).logits
    for layer in layers_of(model):
        for key in layer.experts.shapes:
            getattr(layer.experts, key)[1] += 1.0
    torch.testing.assert_close(model(ids, trace=RoutingTrace(removed={"ffn": 1})).logits, before, rtol=1e-9, atol=1e-9)
    assert (model(ids).logits - whole).abs().max() > 1e-3 and (before - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", FORMS)
def test_bf16_autocast_stays_near_and_differences_are_not_rounded(name):
    model, ids = mixture_of(FORMS[name], dtype=torch.float32).train(), tiny.tokens(2, 9)
    trace = RoutingTrace()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids, trace=trace).logits
    assert (low.float() - model(ids).logits).abs().max() < 0.05 * low.abs().max()
    assert all(one.dtype == torch.float32 for base in trace.bases.values() for one in base.values())


def test_merged_weights_are_never_more_than_a_chunk(monkeypatch):
    """Twelve decisions of one layer, forward and backward, in chunks of two matrices and a half."""
    sizes, right = [], soft_merging.merged

    def watched(gates, base, delta):
        found = right(gates, base, delta)
        sizes.append(found.numel() * found.element_size())
        return found

    one = 16 * 24 * 8
    monkeypatch.setattr(soft_merging, "merged", watched)
    monkeypatch.setattr(soft_merging, "CHUNK_BYTES", 5 * one // 2)
    x, gates = torch.randn(12, 5, 24).double(), torch.rand(12, 3).double()
    base, delta = torch.randn(16, 24).double(), torch.randn(3, 16, 24).double()
    inputs = [tensor.requires_grad_() for tensor in (x, gates, base, delta)]
    out = merged_linear(*inputs)
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert sizes == [2 * one] * 12  # six chunks each way
    expected = torch.einsum("nli,noi->nlo", x, base + torch.einsum("ne,eoi->noi", gates, delta))
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
