"""Every router of tests/routers.py: against its slow twin, causal, the same in any batch and cache, trained as it should be.

The last test compares the table in docs/routing.md with what ran; UPCYCLE_WRITE_TABLES=1 writes it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
import routers
import tiny
import torch
from routers import CASES, PAIRS

from tests.domains import two_domains
from tests.ranks import run_job
from tests.tables import assert_table
from tests.test_ranks import largest_difference, launch, rows
from upcycle.checkpoint import Checkpoint
from upcycle.configuration import UpcycledConfig
from upcycle.router import RoutingTrace
from upcycle.routing import ROUTERS

ran: set[tuple[str, str, str]] = set()  # (case, side, capability)
passed: set[tuple[str, str, str]] = set()  # and it has the capability
STEP = 4000  # at which sample_top1's temperature is 0.67


def forward(name, mixture, ids, mask=None, seed=5):
    """Logits with the case's trace; random routers draw the same numbers every time."""
    torch.manual_seed(seed)
    return mixture(ids, mask, trace=routers.trace_of(name, ids, STEP)).logits


def modes_of(name):
    return (False, True) if CASES[name].trains else (False,)


def test_every_router_is_among_the_cases():
    assert set(ROUTERS) == {case.kind for case in CASES.values()}
    assert set(ROUTERS) == {*reference.ROUTERS, *reference.SEQUENCE_ROUTERS}


# --------------------------------------------------------------------------------------------------------- capabilities


def equals_its_twin(name, side, kind):
    """Logits and every gradient, with left padding, in training and evaluation."""
    ids, mask = tiny.tokens(2, 8), tiny.left_padding(0, 2, sequence=8)
    for training in modes_of(name):
        models, mixture = routers.mixture_of(name, side, kind)
        mixture.train(training)
        ours = forward(name, mixture, ids, mask)
        twin = routers.twin_of(name, side, models, mixture, ids, mask, training, STEP)
        torch.manual_seed(5)
        theirs = twin.logits(ids, mask)
        valid = mask.bool()
        torch.testing.assert_close(ours[valid].float(), theirs[valid].float())
        weight = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        weight = weight * valid[..., None] / valid.sum()
        (ours * weight).sum().backward()
        (theirs * weight).sum().backward()
        expected = tiny.reference_gradients(twin, mixture.config)
        found = tiny.gradients_of(mixture)
        tiny.assert_same_tensors(found, {name: expected[name] for name in found})
        learned = [gradient for name, gradient in found.items() if ".router.weight" in name]
        assert bool(learned) == (CASES[name].learns or (side == "ffn" and CASES[name].only_for_attention))
        # A sampled expert has gate 1 in evaluation, which nothing could change.
        constant = CASES[name].kind == "sample_top1" and not training
        assert constant or all(gradient.abs().max() > 1e-6 for gradient in learned)


def trains(name, side, kind):
    """Gradient checkpointing changes nothing, routing included, though every layer runs twice."""
    if not CASES[name].trains:
        _, mixture = routers.mixture_of(name, side, kind)
        with pytest.raises(ValueError, match="for evaluation only"):
            forward(name, mixture.train(), tiny.tokens())
        return False
    _, mixture = routers.mixture_of(name, side, kind, torch.float32)
    mixture.train()
    ids = tiny.tokens(2, 9)

    def run():
        torch.manual_seed(5)
        trace = routers.trace_of(name, ids, STEP)
        mixture.zero_grad()
        mixture(ids, labels=ids, trace=trace).loss.backward()
        return tiny.gradients_of(mixture), trace.routings

    expected, routing = run()
    mixture.activation_checkpointing_enable()
    found, again = run()
    tiny.assert_same_tensors(found, expected)
    for key in routing:
        assert torch.equal(again[key].experts, routing[key].experts)
        assert torch.equal(again[key].gates, routing[key].gates)
    return True


def generates(name, side, kind):
    """With any cache as without one; rows with padding before them as if alone; beam search moves what is remembered."""
    if CASES[name].kind == "oracle":
        _, mixture = routers.mixture_of(name, side, kind, torch.float32)
        with pytest.raises(ValueError, match="needs each sequence's expert"):
            mixture.generate(tiny.tokens(), max_new_tokens=2)
        return False
    _, mixture = routers.mixture_of(name, side, kind, torch.float32)
    ids, mask = tiny.tokens(2, 7), tiny.left_padding(0, 2, sequence=7)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = mixture.generate(ids, use_cache=False, **options)
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        out = mixture.generate(ids, **options, **cache)
        assert out.sequences.tolist() == expected.sequences.tolist(), cache
        tiny.assert_same_logits(torch.stack(out.logits), torch.stack(expected.logits))
    alone = mixture.generate(ids[1:, 2:], **{**options, "attention_mask": mask[1:, 2:]})
    assert alone.sequences[0].tolist() == expected.sequences[1, 2:].tolist()
    tiny.assert_same_logits(torch.stack(alone.logits)[:, 0], torch.stack(expected.logits)[:, 1])
    beams = {**options, "num_beams": 3, "output_logits": False}
    with_cache, without = (mixture.generate(ids, use_cache=cached, **beams).sequences for cached in (True, False))
    assert with_cache.tolist() == without.tolist()
    return True


@torch.no_grad()
def causal(name, side, kind):
    """Another token at t changes no logits before t, in training and evaluation, and some at or after it."""
    ids = tiny.tokens(2, 9)
    for training in modes_of(name):
        _, mixture = routers.mixture_of(name, side, kind)
        mixture.train(training)
        before = forward(name, mixture, ids)
        for t in (1, 3, 4, 8):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % tiny.VOCAB
            after = forward(name, mixture, changed)
            torch.testing.assert_close(after[:, :t], before[:, :t])
            assert (after[:, t:] - before[:, t:]).abs().max() > 1e-3


@torch.no_grad()
def any_batch(name, side, kind):
    """A row alone, beside others, and with padding before or after it, has the same logits."""
    ids = tiny.tokens(3, 8)
    noisy = CASES[name].kind == "sample_top1" or "noise_std" in CASES[name].options
    for training in (False,) if noisy else modes_of(name):
        _, mixture = routers.mixture_of(name, side, kind)
        mixture.train(training)
        together = forward(name, mixture, ids)
        for row in range(3):
            trace = routers.trace_of(name, ids)
            expert = None if trace.expert_B is None else trace.expert_B[row : row + 1]
            for before, after in ((0, 0), (2, 0), (0, 2)):
                mask = torch.nn.functional.pad(torch.ones(1, 8, dtype=torch.long), (before, after))
                padded = torch.nn.functional.pad(ids[row : row + 1], (before, after), value=7)
                positions = (mask.cumsum(1) - 1).clamp_min(0)
                alone_trace = RoutingTrace(expert_B=expert, step=STEP)
                alone = mixture(padded, mask, position_ids=positions, trace=alone_trace).logits
                torch.testing.assert_close(alone[:, before : before + 8].float(), together[row : row + 1].float())


@torch.no_grad()
def copies_are_the_seed(name, side, kind):
    """In evaluation, where the gates sum to 1 and nowhere else; routers.CASES says of which routers that is true."""
    (seed,) = tiny.dense_models(kind, count=1)
    mixture = tiny.mixture_of([seed] * 3, **getattr(CASES[name], side)())
    ids = tiny.tokens()
    ours, theirs = forward(name, mixture, ids).float(), seed(ids).logits.float()
    assert mixture.config.gates_sum_to_one == CASES[name].sums_to_one
    if CASES[name].sums_to_one:
        torch.testing.assert_close(ours, theirs)
        return True
    assert (ours - theirs).abs().max() > 1e-2
    return False


@torch.no_grad()
def one_hot_is_that_expert(name, side, kind):
    """Forced to an expert: the averaged dense model with that expert's sublayers inside, whatever the router."""
    models, mixture = routers.mixture_of(name, side, kind)
    ids = tiny.tokens()
    for expert in range(3):
        trace = routers.trace_of(name, ids)
        trace.forced = expert
        twin = reference.ReferenceMixture(models, [], attention=mixture.config.attention, kv=mixture.config.kv)
        twin.forced = expert
        torch.testing.assert_close(mixture(ids, trace=trace).logits.float(), twin.logits(ids).float())


CAPABILITIES = {
    "equals its slow twin": equals_its_twin,
    "trains": trains,
    "generates": generates,
    "causal": causal,
    "any batch and padding": any_batch,
    "copies are the seed": copies_are_the_seed,
    "one-hot is that expert": one_hot_is_that_expert,
}
RUNS = ("goes on bit for bit", "two ranks are one")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("name", "side"), PAIRS)
def test_router(name, side, capability):
    found = {CAPABILITIES[capability](name, side, kind) is not False for kind in ("llama", "gpt_neox")}
    assert len(found) == 1
    ran.add((name, side, capability))
    if found == {True}:
        passed.add((name, side, capability))


@pytest.mark.parametrize("kind", ["family/mistral", "family/gemma3_text"])
@pytest.mark.parametrize("name", ["segments, top-k", "first k tokens", "expert choice"])
def test_a_window_hides_no_padding(name, kind):
    """Caches of fixed size and windows shorter than the text: the masks that generation prepares do not tell padding."""
    assert generates(name, "both", kind)


# ------------------------------------------------------------------------------------------------------- training runs


def side_of(name: str) -> str:
    """Runs are made with the router on both sides, where it can be."""
    return "ffn" if CASES[name].refused_for_attention else "both"


def settings(steps: int = 6) -> dict:
    return {
        "tokens": steps * 64, "proportions": {"low": 0.5, "high": 0.5}, "sequence_length": 16, "batch_sequences": 4,
        "micro_batch_sequences": 1, "lr": 3e-3, "schedule": {"warmup_steps": 2}, "precision": "fp32",
    }  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Data, and a mixture on disk for every case that trains."""
    root = tmp_path_factory.mktemp("routers")
    two_domains(root / "data")
    for name in TRAINED:
        torch.manual_seed(3)
        losses = {"z_coefficient": 0.01} if CASES[name].learns else {}
        _, mixture = routers.mixture_of(name, side_of(name), dtype=torch.float32, **losses)
        mixture.save_pretrained(root / "models" / routers.file_of(name))
    return root


TRAINED = [name for name, case in CASES.items() if case.trains]


def job(root: Path, name: str, out: str, **changes) -> dict:
    data = {domain: str(root / "data" / domain) for domain in ("low", "high")}
    model = root / "models" / routers.file_of(name)
    return {
        "model": str(model),
        "data": data,
        "out": str(root / out / routers.file_of(name)),
        "train": settings(),
    } | changes


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_goes_on_bit_for_bit(shop, name):
    """Random draws, biases and all: stopped after a snapshot and started again, it ends with the same bits."""
    run_job(job(shop, name, "straight"))
    run_job(job(shop, name, "cut", stop=5, checkpoint_steps=3))
    run_job(job(shop, name, "cut", checkpoint_steps=3))
    straight, cut = (Checkpoint(shop / out / routers.file_of(name)) for out in ("straight", "cut"))
    assert straight.names == cut.names
    for tensor in straight.names:
        assert torch.equal(straight.get(tensor), cut.get(tensor)), tensor
    assert rows(shop / "cut" / routers.file_of(name)) == rows(shop / "straight" / routers.file_of(name))
    trained = Checkpoint(shop / "models" / routers.file_of(name))
    assert not torch.equal(trained.get("lm_head.weight"), straight.get("lm_head.weight"))
    ran.add((name, side_of(name), "goes on bit for bit"))
    passed.add((name, side_of(name), "goes on bit for bit"))


@pytest.fixture(scope="module")
def two_ranks(shop) -> Path:
    """All cases trained by two processes (DDP), and by one."""
    launch([job(shop, name, "ranks") for name in TRAINED], shop, "ddp")
    for name in TRAINED:
        run_job(job(shop, name, "single"))
    return shop


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_are_one(two_ranks, name):
    """The same losses at every step, and weights and biases in the end; a router with random draws has its own on each
    rank, as dropout has."""
    ours, single = (rows(two_ranks / out / routers.file_of(name)) for out in ("ranks", "single"))
    difference = largest_difference(ours, single)
    assert (difference <= 1e-4) == (not CASES[name].draws)
    if not CASES[name].draws:
        trained, alone = (Checkpoint(two_ranks / out / routers.file_of(name)) for out in ("ranks", "single"))
        for tensor in alone.names:
            torch.testing.assert_close(trained.get(tensor), alone.get(tensor), rtol=1e-3, atol=5e-4, msg=tensor)
    ran.add((name, side_of(name), "two ranks are one"))
    if not CASES[name].draws:
        passed.add((name, side_of(name), "two ranks are one"))


def test_the_table_in_the_docs_is_what_ran():
    """Whatever ran; slow columns count where the slow tests ran."""
    wanted = {(name, side, capability) for name, side in PAIRS for capability in CAPABILITIES}
    wanted |= {(name, side_of(name), "goes on bit for bit") for name in TRAINED}
    slow = {(name, side_of(name), "two ranks are one") for name in TRAINED}
    if wanted - ran:
        pytest.skip("not all tests of routers ran and passed in this process")
    if slow - ran:
        passed.update(slow - {(name, side_of(name), "two ranks are one") for name in TRAINED if CASES[name].draws})
    columns = [*CAPABILITIES, *RUNS]
    rows = []
    for name, case in CASES.items():
        cells = ["yes" if (name, "ffn" if c in CAPABILITIES else side_of(name), c) in passed else "no" for c in columns]
        sides = all((name, "both", c) in passed for c in CAPABILITIES if (name, "ffn", c) in passed)
        rows.append([name, *cells, "no" if case.refused_for_attention or not sides else "yes"])
    assert_table("routing.md", "table", ["router", *columns, "attention experts"], rows)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused_for_attention])
def test_a_router_that_attention_experts_cannot_have_is_refused(name):
    with pytest.raises(ValueError, match=CASES[name].refused_for_attention):
        UpcycledConfig(experts=["seed", "code", "law"], **CASES[name].both())
