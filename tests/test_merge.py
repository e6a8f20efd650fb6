"""Merging methods against loops over entries in float64, closed forms, identities of the formulas, and peft's functions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import reference
import torch
from peft.utils import merge_utils
from torch import Tensor

from upcycle.curvature_merging import mats_solved
from upcycle.kronecker import FACTORS, factor_pair
from upcycle.merge import METHODS, check_options, needed_statistics
from upcycle.merge_report import task_arithmetic_error, task_vectors, ties_entries
from upcycle.merging import Member, Merging
from upcycle.task_vectors import stays_mask, trimmed

OUT, IN = 3, 4
NAMES = ("seed", "code", "law", "math")
WEIGHTS = {"seed": 1.0, "code": 2.0, "law": 0.5, "math": 1.0}


def positive(size: int, generator: torch.Generator, rank: int | None = None) -> Tensor:
    rows = torch.randn(rank or size + 2, size, generator=generator, dtype=torch.float64)
    return (rows.T @ rows / len(rows)).float()


def members_of(shape=(OUT, IN), names=NAMES, weights=None, rng_seed=0, dtype=torch.float32) -> dict[str, Member]:
    """Random tensors, each with every statistic of a linear that stores (out, in)."""
    g = torch.Generator().manual_seed(rng_seed)
    found = {}
    for name in names:
        tensor = torch.randn(shape, generator=g).to(dtype)
        diagonal = torch.randn(shape, generator=g).square()
        statistics = {"fisher": diagonal, "fisher_norm": diagonal.norm() * 3, "hessian": diagonal + 0.1}
        if len(shape) == 2:
            statistics |= {
                "gram": positive(shape[1], g),
                "kfac_in": positive(shape[1], g),
                "kfac_out": positive(shape[0], g),
                "camex_score": torch.rand((), generator=g),
            }
            sizes = (*factor_pair(shape[0]), *factor_pair(shape[1]))
            for factor, size in zip(FACTORS, sizes, strict=True):
                statistics[f"camex_{factor}"] = torch.randn(2, size, size, generator=g)
        found[name] = Member(tensor, (weights or dict.fromkeys(names, 1.0))[name], statistics)
    return found


def merging_of(shape=(OUT, IN), names=NAMES, linear=True, **more) -> Merging:
    members = members_of(shape, names, **more)
    axis = 1 if linear and len(shape) == 2 else None
    return Merging("layers.0.weight", members, members["seed"], axis)


def flat(members) -> list[tuple[float, list[float]]]:
    return [(member.weight, reference.entries_of(member.tensor)) for _, member in members]


def rows(tensor: Tensor) -> list[list[float]]:
    return tensor.double().tolist()


def twin(name: str, merging: Merging, options: dict) -> list[float]:
    """What the method gives, entry by entry."""
    chosen, present = check_options(name, options), merging.present
    models, seed = flat(present), reference.entries_of(merging.seed.tensor)
    named = {who: (member.weight, reference.entries_of(member.tensor)) for who, member in present}
    statistic = {key: [reference.entries_of(m.statistics[key]) for _, m in present] for key in ("fisher", "hessian")}
    norms = [m.statistics["fisher_norm"].item() if chosen.get("normalise") else 1.0 for _, m in present]
    size = len(seed)
    if name in ("average", "weighted"):
        ones = [[1.0] * size for _ in models]
        return reference.fisher(models, ones, [1.0] * len(models), 1.0)
    if name == "task_arithmetic":
        return reference.task_arithmetic(models, seed, chosen["scale"])
    if name == "ties":
        return reference.ties(models, seed, chosen["density"], chosen["scale"])
    if name == "dare":
        return reference.dare(
            named, seed, chosen["drop"], chosen["combine"], chosen["scale"], merging.name, chosen["rng_seed"]
        )
    if name == "dare_ties":
        return reference.dare_ties(named, seed, chosen["drop"], chosen["scale"], merging.name, chosen["rng_seed"])
    if name == "fisher":
        return reference.fisher(models, statistic["fisher"], norms, chosen["floor"])
    if name == "gradient_matching":
        branches = [(who, m) for who, m in present if who != "seed"]
        hessians = [reference.entries_of(m.statistics[chosen["curvature"]]) for _, m in branches]
        start = reference.entries_of(merging.seed.statistics[chosen["curvature"]])
        return reference.gradient_matching(flat(branches), hessians, seed, start, chosen["alpha"], chosen["damping"])
    if name == "regmean":
        turned = [(m.weight, rows(m.tensor.T)) for _, m in present]
        grams = [rows(m.statistics["gram"]) for _, m in present]
        found = reference.regmean(turned, grams, chosen["off_diagonal"], chosen["ridge"])
        return [found[i][o] for o in range(OUT) for i in range(IN)]
    if name == "camex":
        return camex_twin(merging, chosen)
    curvatures = [curvature_of(m, chosen, norm) for (_, m), norm in zip(present, norms, strict=True)]
    found = reference.general_merge(curvatures, [reference.entries_of(m.tensor.T) for _, m in present])
    return torch.tensor(found).view(IN, OUT).T.flatten().tolist()


def camex_twin(merging: Merging, chosen: dict) -> list[float]:
    """θ_m + α Σ M (s τ): learned maps written out; others as what their own merge is moved from the base."""
    by_name = {"seed": merging.seed.tensor.double(), "zeros": torch.zeros(OUT, IN, dtype=torch.float64)}
    by_name |= {who: m.tensor.double() for who, m in merging.members.items()}
    by_name["mean"] = torch.tensor(twin("average", merging, {}), dtype=torch.float64).view(OUT, IN)
    base = by_name[chosen["base"]]
    if chosen["curvature"] != "learned":  # (Σ C)⁻¹ Σ C τ, with C written out, so that Σ s M = I
        kind = {"curvature": chosen["curvature"], "off_diagonal": chosen["off_diagonal"], "floor": chosen["floor"]}
        curvatures = [curvature_of(m, kind, m.statistics["fisher_norm"].item()) for _, m in merging.present]
        taus = [reference.entries_of((m.tensor.double() - base).T) for _, m in merging.present]
        moved = torch.tensor(reference.general_merge(curvatures, taus), dtype=torch.float64).view(IN, OUT).T
        return (base + chosen["alpha"] * moved).flatten().tolist()
    members = [m for _, m in merging.present]
    factors = [[m.statistics[f"camex_{one}"].double() for one in FACTORS] for m in members]
    maps = [reference.kronecker_map(list(zip(*own, strict=True))) for own in factors]
    thetas, scores = [m.tensor.double() for m in members], [m.statistics["camex_score"].double() for m in members]
    differences = reference.camex_differences(thetas, base, maps, chosen["alpha"], election=False)
    return reference.camex_merged(base, differences, scores).flatten().tolist()


def curvature_of(member: Member, chosen: dict, norm: float) -> list[list[float]]:
    """C_i of vec(W), W as (in, out), written out."""
    identity = lambda n: [[float(i == j) for j in range(n)] for i in range(n)]  # noqa: E731
    if chosen["curvature"] == "kfac":
        sides = [reference.shrunk(rows(member.statistics[k]), chosen["off_diagonal"]) for k in ("kfac_in", "kfac_out")]
        whole = reference.kronecker(*sides)
    elif chosen["curvature"] == "gram":
        gram = reference.shrunk(rows(member.statistics["gram"]), chosen["off_diagonal"])
        whole = reference.kronecker(gram, identity(OUT))
    elif chosen["curvature"] == "fisher":
        diagonal = [max(f, chosen["floor"]) / norm for f in reference.entries_of(member.statistics["fisher"].T)]
        whole = [[d * (i == j) for j in range(len(diagonal))] for i, d in enumerate(diagonal)]
    else:
        whole = identity(OUT * IN)
    return [[member.weight * x for x in row] for row in whole]


CASES = [
    ("average", {}), ("weighted", {}), ("task_arithmetic", {}), ("task_arithmetic", {"scale": 1.5}),
    ("ties", {}), ("ties", {"density": 0.5, "scale": 0.7}), ("ties", {"density": 1.0}),
    ("dare", {}), ("dare", {"drop": 0.4, "combine": "sum", "rng_seed": 7}), ("dare", {"drop": 0.0, "scale": 2.0}),
    ("dare_ties", {"drop": 0.5}), ("dare_ties", {"drop": 0.3, "scale": 0.5, "rng_seed": 3}),
    ("fisher", {}), ("fisher", {"normalise": False, "floor": 0.5}),
    ("regmean", {}), ("regmean", {"off_diagonal": 0.1, "ridge": 0.2}), ("regmean", {"off_diagonal": 1.0}),
    ("gradient_matching", {}), ("gradient_matching", {"curvature": "hessian", "alpha": 0.5, "damping": 0.2}),
    ("mats", {"curvature": "identity"}), ("mats", {"curvature": "fisher"}), ("mats", {"curvature": "gram"}),
    ("mats", {}), ("mats", {"off_diagonal": 0.5}),
    ("camex", {}), ("camex", {"base": "mean", "alpha": 0.7}), ("camex", {"base": "zeros"}), ("camex", {"base": "code"}),
    ("camex", {"curvature": "identity", "alpha": 0.5}), ("camex", {"curvature": "fisher"}),
    ("camex", {"curvature": "fisher", "alpha": 0.9, "base": "mean"}), ("camex", {"curvature": "kfac", "alpha": 0.9}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighed"])
def test_every_method_equals_a_loop_over_entries(name, options, weights):
    merging = merging_of(weights=weights)
    closely = {"tolerance": 1e-9} if name == "mats" or options.get("curvature") == "kfac" else {}
    found = METHODS[name](merging, **options, **closely)
    assert found.dtype == torch.float32 and found.shape == (OUT, IN)
    expected = torch.tensor(twin(name, merging, options), dtype=torch.float64).view(OUT, IN)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_order_of_models_and_dtype_change_nothing(name, options):
    merging = merging_of(weights=WEIGHTS)
    turned = replace(merging, members=dict(reversed(merging.members.items())))
    assert torch.equal(METHODS[name](merging, **options), METHODS[name](turned, **options))
    low = {who: replace(m, tensor=m.tensor.bfloat16()) for who, m in merging.members.items()}
    high = {who: replace(m, tensor=m.tensor.float()) for who, m in low.items()}
    results = [METHODS[name](replace(merging, members=one, seed=one["seed"]), **options) for one in (low, high)]
    assert results[0].dtype == torch.float32 and torch.equal(*results)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_model_of_weight_0_is_not_there(name, options):
    merging = merging_of(weights=WEIGHTS | {"law": 0.0})
    without = replace(merging, members={who: m for who, m in merging.members.items() if who != "law"})
    assert torch.equal(METHODS[name](merging, **options), METHODS[name](without, **options))


FROM_A_MODEL = [
    (name, options) for name, options in CASES if options != {"base": "zeros"}
]  # there M acts on θ, not on τ


@pytest.mark.parametrize(("name", "options"), FROM_A_MODEL, ids=str)
def test_branches_that_are_the_seed_are_the_seed(name, options):
    merging = merging_of()
    seed = merging.seed.tensor
    same = replace(merging, members={who: replace(m, tensor=seed) for who, m in merging.members.items()})
    torch.testing.assert_close(METHODS[name](same, **options), seed, rtol=0, atol=1e-6)


EQUAL = [
    ("average", {}), ("fisher", {}), ("regmean", {}), ("mats", {"curvature": "identity"}), ("mats", {"curvature": "gram"}),
    ("mats", {"curvature": "fisher"}), ("mats", {}), ("gradient_matching", {"alpha": 1 / 3}),
    ("ties", {"density": 1.0, "scale": 1.0}),
]  # fmt: skip
UNEQUAL = [("task_arithmetic", {}), ("ties", {"density": 0.5}), ("dare", {"drop": 0.5}), ("dare_ties", {"drop": 0.5})]


@pytest.mark.parametrize(("name", "options"), EQUAL + UNEQUAL, ids=str)
def test_branches_that_are_equal_come_back_where_the_formula_says_so_and_not_elsewhere(name, options):
    merging = merging_of()
    one = merging.members["code"].tensor
    branches = {who: replace(m, tensor=one) for who, m in merging.members.items() if who != "seed"}
    found = METHODS[name](replace(merging, members=branches), **options)
    same = torch.allclose(found, one, rtol=1e-4, atol=1e-4)
    assert same == ((name, options) in EQUAL)


def test_the_general_form_holds_the_special_cases():
    """C = I the average, C = F Fisher merging, C = G RegMean: with the same floor, norm and off-diagonals."""
    merging = merging_of(weights=WEIGHTS)
    pairs = [
        (METHODS["average"](merging), {"curvature": "identity"}),
        (METHODS["fisher"](merging, floor=0.3), {"curvature": "fisher", "floor": 0.3}),
        (METHODS["fisher"](merging, normalise=False), {"curvature": "fisher", "normalise": False}),
        (METHODS["regmean"](merging, off_diagonal=0.7), {"curvature": "gram", "off_diagonal": 0.7}),
    ]
    for expected, options in pairs:
        solved = mats_solved(merging, tolerance=1e-9, **options)
        assert solved.converged and solved.residual < 1e-8 and solved.iterations <= OUT * IN + 5
        torch.testing.assert_close(solved.tensor, expected, rtol=1e-5, atol=1e-5)
    other = METHODS["regmean"](merging, off_diagonal=0.1)
    assert (other - pairs[-1][0]).abs().max() > 1e-2


def test_conjugate_gradient_goes_the_steps_of_the_published_algorithm():
    merging = merging_of()
    start = METHODS["task_arithmetic"](merging, scale=0.3)
    chosen = check_options("mats", {})
    curvatures = [curvature_of(m, chosen, 1.0) for _, m in merging.present]
    size = OUT * IN
    total = [[sum(c[i][j] for c in curvatures) for j in range(size)] for i in range(size)]
    thetas = [reference.entries_of(m.tensor.T) for _, m in merging.present]
    right = [
        sum(c[i][j] * t[j] for c, t in zip(curvatures, thetas, strict=True) for j in range(size)) for i in range(size)
    ]
    for steps in (1, 3):
        solved = mats_solved(merging, iterations=steps)
        expected = reference.conjugate_gradient(total, right, reference.entries_of(start.T), steps)
        assert solved.iterations == steps and not solved.converged
        torch.testing.assert_close(
            solved.tensor.T.flatten().double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5
        )


def test_linears_are_turned_by_where_their_inputs_lie():
    """GPT-2's Conv1D stores (in, out): the transpose of the other, and so is the merge."""
    merging = merging_of()
    turned = {who: replace(m, tensor=m.tensor.T.contiguous()) for who, m in merging.members.items()}
    conv = Merging(merging.name, turned, turned["seed"], in_axis=0)
    for name, options in (("regmean", {}), ("mats", {}), ("mats", {"curvature": "gram"})):
        torch.testing.assert_close(
            METHODS[name](conv, **options).T, METHODS[name](merging, **options), rtol=1e-5, atol=1e-6
        )
    plain = replace(merging, in_axis=None)  # no linear's weight: averaged
    assert torch.equal(METHODS["regmean"](plain), METHODS["average"](plain))


def test_trimming_keeps_exactly_so_many_and_the_first_of_equals():
    tau = torch.tensor([1.0, -1.0, 2.0, 1.0, -3.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert trimmed(tau, 0.4).tolist() == [1.0, -1.0, 2.0, 0, -3.0, 0, 0, 0, 0, 0]
    assert trimmed(tau, 0.01).tolist() == [0, 0, 0, 0, -3.0, 0, 0, 0, 0, 0]
    assert (trimmed(torch.randn(100), 0.29) != 0).sum() == 29  # which floats make 28.999...


def test_ties_by_hand():
    """Signs elected by sums; a sum of 0 elects nobody; entries of the other sign neither count nor are counted."""
    seed = torch.zeros(4)
    taus = {"a": [3.0, 1.0, 2.0, 0.5], "b": [-1.0, 1.0, -2.0, 0.25], "c": [1.0, -5.0, 0.0, 0.0]}
    members = {name: Member(torch.tensor(tau)) for name, tau in taus.items()}
    found = METHODS["ties"](Merging("t", members, Member(seed)), density=1.0)
    assert found.tolist() == [2.0, -5.0, 0.0, 0.375]


def test_dare_keeps_the_expectation_and_its_masks_are_keyed():
    merging = merging_of(shape=(40,), linear=False)
    mean = METHODS["average"](merging)
    draws = torch.stack([METHODS["dare"](merging, drop=0.5, rng_seed=seed) for seed in range(400)])
    errors = (draws.mean(0) - mean).abs() / (draws.std(0) / math.sqrt(len(draws)))
    assert (errors < 3).float().mean() > 0.94 and errors.max() < 4.5
    masks = [
        stays_mask(1000, 0.5, *key)
        for key in (("a", "x", 1), ("a", "x", 1), ("b", "x", 1), ("a", "y", 1), ("a", "x", 2))
    ]
    assert torch.equal(masks[0], masks[1]) and abs(masks[0].float().mean() - 0.5) < 0.05
    assert all(0.4 < (masks[0] == other).float().mean() < 0.6 for other in masks[2:])


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_peft_computes_the_same_where_it_computes_the_formula(density):
    """task_arithmetic and ties of task vectors with weights of 1. peft's DARE draws other masks; its weighed TIES divides by the
    number of those that agree, ours by their weights."""
    merging = merging_of(shape=(25, 16), linear=False, names=("seed", "a", "b", "c"))
    branches = {who: m for who, m in merging.members.items() if who != "seed"}
    merging, seed = replace(merging, members=branches), merging.seed.tensor
    taus, ones = [m.tensor - seed for m in branches.values()], torch.ones(3)
    torch.testing.assert_close(
        METHODS["task_arithmetic"](merging, scale=1.0) - seed,
        merge_utils.task_arithmetic(taus, ones),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(
        METHODS["ties"](merging, density=density) - seed, merge_utils.ties(taus, ones, density), rtol=1e-5, atol=1e-5
    )
    weighed = torch.tensor([1.0, 3.0, 1.0])
    heavier = {who: replace(m, weight=float(w)) for (who, m), w in zip(branches.items(), weighed, strict=True)}
    ours = METHODS["ties"](replace(merging, members=heavier), density=density) - seed
    assert not torch.allclose(ours, merge_utils.ties(taus, weighed, density), atol=1e-3)


def test_what_fisher_knows_nothing_of_is_averaged():
    merging = merging_of()
    silent = {
        who: replace(m, statistics={"fisher": torch.zeros(OUT, IN), "fisher_norm": torch.zeros(())})
        for who, m in merging.members.items()
    }
    torch.testing.assert_close(METHODS["fisher"](replace(merging, members=silent)), METHODS["average"](merging))
    mixed = merging.members | {"law": silent["law"]}
    with pytest.raises(ValueError, match="Fisher of law has the norm 0 over the whole model, expected above 0"):
        METHODS["fisher"](replace(merging, members=mixed))


def test_task_vectors_and_conflicts_are_counted():
    merging = merging_of(shape=(50, 8), linear=False)
    found, entries = task_vectors(merging), ties_entries(merging, density=0.3)
    seed = merging.seed.tensor.double()
    taus = {who: (m.tensor.double() - seed).flatten().tolist() for who, m in merging.members.items() if who != "seed"}
    for (a, b), cosine in found.cosines.items():
        dot = sum(x * y for x, y in zip(taus[a], taus[b], strict=True))
        assert cosine == pytest.approx(dot / math.hypot(*taus[a]) / math.hypot(*taus[b]), rel=1e-5)
        alike = sum(x * y > 0 for x, y in zip(taus[a], taus[b], strict=True))
        assert found.sign_agreement[a, b] == pytest.approx(alike / 400)
    kept = [reference.trimmed(tau, 0.3) for tau in taus.values()]
    conflict = sum(any(k[j] > 0 for k in kept) and any(k[j] < 0 for k in kept) for j in range(400))
    nothing = sum(all(k[j] == 0 for k in kept) for j in range(400))
    assert entries == {"trimmed": nothing, "agreed": 400 - nothing - conflict, "conflict": conflict}
    assert (found + found).norms["code"] == pytest.approx(math.sqrt(2) * math.hypot(*taus["code"]))


def test_task_arithmetic_errs_as_predicted_on_quadratic_losses():
    """ℓ_i(θ) = ½ (θ − c_i)ᵀ diag(h_i) (θ − c_i) beside a pull towards the seed: every minimum is known in closed form."""
    g = torch.Generator().manual_seed(0)
    pull, seed = torch.rand(6, generator=g) + 0.5, torch.randn(6, generator=g)
    h = {name: torch.rand(6, generator=g) + 0.1 for name in "ab"}
    centre = {name: torch.randn(6, generator=g) for name in "ab"}
    own = {name: (pull * seed + h[name] * centre[name]) / (pull + h[name]) for name in "ab"}
    target = (pull * seed + sum(h[n] * centre[n] for n in "ab")) / (pull + sum(h.values()))
    merged = seed + sum(own[n] - seed for n in "ab")
    gradients = {n: (h[n] * (target - centre[n]), h[n] * (own[n] - centre[n])) for n in "ab"}
    predicted = task_arithmetic_error(pull, gradients, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(predicted, target - merged, rtol=1e-4, atol=1e-5)
    members = {n: Member(own[n], 1.0, {"hessian": h[n]}) for n in "ab"}
    matched = METHODS["gradient_matching"](
        Merging("t", members, Member(seed, 1.0, {"hessian": pull})), curvature="hessian"
    )
    torch.testing.assert_close(matched, target, rtol=1e-4, atol=1e-5)  # exact where losses are quadratic


def test_wrong_options_and_tensors_are_explained():
    merging = merging_of()
    bare = {who: Member(m.tensor) for who, m in merging.members.items()}
    cases = {
        "merge='tise' is not known; expected one of average.*did you mean ties": lambda: check_options("tise"),
        "merge=ties has no option 'densty'; expected density, scale; did you mean density": lambda: check_options(
            "ties", {"densty": 0.1}
        ),
        "merge=ties: density=0: input should be greater than 0": lambda: check_options("ties", {"density": 0}),
        "merge=mats: floor=0.1 has no effect|merge=mats: floor has no effect": lambda: check_options(
            "mats", {"floor": 0.1}
        ),
        "the statistic 'fisher_norm' of code is missing": lambda: METHODS["fisher"](replace(merging, members=bare)),
        "takes differences from the seed": lambda: METHODS["ties"](replace(merging, seed=None)),
        "expected one shape": lambda: Merging("t", merging.members | {"x": Member(torch.zeros(2))}),
        "has the weight -1": lambda: Merging("t", {"x": Member(torch.zeros(2), -1.0)}),
        "no member of 1 has a weight above 0": lambda: Merging("t", {"x": Member(torch.zeros(2), 0.0)}),
        "add up to a singular one": lambda: METHODS["regmean"](
            replace(merging, members={"x": replace(bare["code"], statistics={"gram": torch.ones(IN, IN)})}),
            off_diagonal=1.0,
        ),
    }
    for message, attempt in cases.items():
        with pytest.raises(ValueError, match=message):
            attempt()
    assert needed_statistics("mats") == ("kfac_in", "kfac_out") and needed_statistics("average") == ()
    assert needed_statistics("fisher", {"normalise": False}) == ("fisher",)
