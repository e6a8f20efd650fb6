"""The whole mixture against a mixture written out from the dense models, and what holds in every use of it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import reference
import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.integrations import moe

from upcycle import modeling
from upcycle.configuration import UpcycledConfig
from upcycle.families import family_of
from upcycle.modeling import UpcycledForCausalLM, UpcycledModel
from upcycle.router import Router, RoutingTrace

FAMILIES = ("llama", "gpt_neox")
ATTENTION = {
    "btx": {"attention": "merged"},
    "bam_expert": {"attention": "mixture", "kv": "expert"},
    "bam_shared": {"attention": "mixture", "kv": "shared"},
}
TOP1 = {"router": "softmax_topk", "num_experts_per_tok": 1, "gate_scale": "straight_through"}
TOP2 = {"router": "topk_softmax", "num_experts_per_tok": 2}
SOFT = {"router": "soft"}
ROUTERS = {"top1": TOP1, "top2": TOP2, "soft": SOFT}
ROUTERS |= {
    f"softmax_top2_{scale}": {"router": "softmax_topk", "num_experts_per_tok": 2, "gate_scale": scale}
    for scale in ("none", "sum_to_one", "straight_through", "compensate")
}
AUXILIARY = {"balance": "switch", "balance_coefficient": 0.5, "z_coefficient": 0.3}
EVERY_LOSS = AUXILIARY | {"similarity_coefficient": 0.2, "entropy_coefficient": 0.1}


def exact(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def gradients_after(loss, model):
    model.zero_grad()
    loss.backward()
    return tiny.gradients_of(model)


# ---------------------------------------------------------------------------------------------------------- experts


def kernel_spies(monkeypatch, calls: list[tuple[str, torch.dtype, torch.dtype]]) -> None:
    """Record (name, input dtype, weight dtype) of each call that computes experts."""
    loop, batched, grouped = modeling._loop_over_experts, moe._batched_linear, torch.nn.functional.grouped_mm

    def spy_loop(experts, hidden, *args):
        calls.append(("eager", hidden.dtype, experts.down_proj.dtype))
        return loop(experts, hidden, *args)

    def spy_batched(x, weight, *args, **kwargs):
        calls.append(("batched_mm", x.dtype, weight.dtype))
        return batched(x, weight, *args, **kwargs)

    def spy_grouped(x, weight, *args, **kwargs):
        calls.append(("grouped_mm", x.dtype, weight.dtype))
        return grouped(x, weight, *args, **kwargs)

    monkeypatch.setattr(modeling, "_loop_over_experts", spy_loop)
    monkeypatch.setattr(moe, "_batched_linear", spy_batched)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", spy_grouped)


CALLS_A_LAYER = {"eager": 1, "batched_mm": 2, "grouped_mm": 2}


@pytest.mark.parametrize("implementation", CALLS_A_LAYER)
@pytest.mark.parametrize("kind", FAMILIES)
def test_stacked_experts_equal_the_loop_over_mlps(kind, implementation, monkeypatch):
    """Outputs and all gradients of one layer, for each implementation, which really is the one that ran."""
    models = tiny.dense_models(kind, dtype=torch.float32)
    mixture = tiny.mixture_of(models, **TOP2)
    mixture.set_experts_implementation(implementation)
    calls = []
    kernel_spies(monkeypatch, calls)
    layer = mixture.model.decoder.layers[0].mlp
    hidden = torch.randn(2, 5, 32, requires_grad=True)
    weight = torch.randn(2, 5, 32)
    (layer(hidden) * weight).sum().backward()
    assert {name for name, *_ in calls} == {implementation} and len(calls) == CALLS_A_LAYER[implementation]

    routers = tiny.routers_of(mixture, "ffn")
    twin = reference.ReferenceMixture(models, routers, "topk_softmax", 2)
    mlps = [getattr(model, family_of(model.config).decoder).layers[0].mlp for model in twin.experts]
    twin_hidden = hidden.detach().double().requires_grad_()
    tokens = twin_hidden.flatten(0, 1)
    _, decisions = reference.route(tokens, twin.ffn_routers[0], "topk_softmax", 2, "none")
    expected = reference.moe_feed_forward(tokens, decisions, mlps).view_as(hidden)
    (expected * weight).sum().backward()
    torch.testing.assert_close(layer(hidden), expected.float())
    torch.testing.assert_close(hidden.grad, twin_hidden.grad.float())
    tiny.assert_same_tensors(tiny.gradients_of(mixture), tiny.reference_gradients(twin, mixture.config))


@pytest.mark.parametrize("implementation", CALLS_A_LAYER)
@pytest.mark.parametrize("kind", FAMILIES)
def test_experts_implementation_runs_in_every_layer(kind, implementation, monkeypatch):
    mixture = tiny.mixture_of(tiny.dense_models(kind, dtype=torch.float32, num_hidden_layers=3))
    mixture.set_experts_implementation(implementation)
    calls = []
    kernel_spies(monkeypatch, calls)
    mixture(tiny.tokens())
    assert [name for name, *_ in calls] == [implementation] * CALLS_A_LAYER[implementation] * 3


# ----------------------------------------------------------------------------------------------- the whole mixture


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", tiny.DENSE)
def test_mixture_equals_the_reference_mixture(kind, attention, router):
    """Logits, cross-entropy and all gradients, with left padding."""
    models, choices = tiny.dense_models(kind), ROUTERS[router] | ATTENTION[attention]
    mixture = tiny.mixture_of(models, **choices)
    ids, mask = tiny.tokens(2, 7), tiny.left_padding(0, 2, sequence=7)
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 2] = -100  # the first real token would be predicted from padding
    out = mixture(ids, mask, labels=labels)
    twin = reference.ReferenceMixture(
        models,
        tiny.routers_of(mixture, "ffn"),
        choices["router"],
        choices.get("num_experts_per_tok"),
        choices.get("gate_scale", "none"),
        choices["attention"],
        choices.get("kv", "expert"),
        tiny.routers_of(mixture, "attention"),
    )
    logits = twin.logits(ids, mask)
    torch.testing.assert_close(out.logits[mask.bool()].float(), logits[mask.bool()].float())
    nats, count = reference.next_token_cross_entropy(logits, labels)
    torch.testing.assert_close(out.cross_entropy.float(), (nats / count).float())
    (nats / count).backward()
    ours = gradients_after(out.loss, mixture)
    tiny.assert_same_tensors(ours, tiny.reference_gradients(twin, mixture.config))
    ffn_routers = [g for name, g in ours.items() if "mlp.router" in name]
    assert all(g.abs().max() > 1e-4 for g in ffn_routers)


@pytest.mark.parametrize("kind", FAMILIES)
def test_auxiliary_losses_equal_the_reference(kind):
    models = tiny.dense_models(kind)
    mixture = tiny.mixture_of(models, **TOP2, **AUXILIARY).train()
    ids, mask = tiny.tokens(2, 7), tiny.left_padding(0, 3, sequence=7)
    twin = reference.ReferenceMixture(models, tiny.routers_of(mixture, "ffn"), "topk_softmax", 2)
    twin.logits(ids, mask)
    out = mixture(ids, mask, labels=ids.masked_fill(mask == 0, -100))
    valid = mask.bool().tolist()
    balance, z = (
        reference.balance_loss(twin.ffn, valid, "switch", "sequence"),
        reference.z_loss([logits for logits, _ in twin.ffn], valid),
    )
    torch.testing.assert_close(out.aux_losses["balance"].float(), balance.float())
    torch.testing.assert_close(out.aux_losses["z"].float(), z.float())
    tokens_per_target = mask.sum() / (mask.sum() - 1)  # the first row's first token has nothing before it
    weighted = 0.5 * out.aux_losses["balance"] + 0.3 * out.aux_losses["z"]
    torch.testing.assert_close(out.loss, out.cross_entropy + weighted * tokens_per_target)


@pytest.mark.parametrize("side", ["ffn", "attention"])
def test_every_loss_of_either_router_is_in_the_training_loss(side):
    models, ids = tiny.dense_models("llama"), tiny.tokens(2, 7)
    # Switch's assignments are constant where attention takes every expert, and refused.
    kind = "switch" if side == "ffn" else "btx"
    losses = EVERY_LOSS | {"balance": kind}
    choices = losses if side == "ffn" else {"attention_losses": losses}
    mixture = tiny.mixture_of(models, **TOP2, attention="mixture", **choices).train()
    trace = RoutingTrace()
    out = mixture(ids, labels=ids, trace=trace)
    logits, valid = [routing.logits for routing in trace.of(side)], [[True] * 7] * 2
    decide = (lambda row: reference.topk_softmax(row, 2)) if side == "ffn" else reference.soft
    prefix = "" if side == "ffn" else "attention_"
    expected = {
        "balance": reference.balance_loss([(rows, [decide(row) for row in rows]) for rows in logits], valid, kind, "sequence"),
        "z": reference.z_loss(logits, valid),
        "similarity": reference.similarity_loss(logits, valid),
        "entropy": reference.entropy_loss(logits, valid),
    }  # fmt: skip
    assert set(out.aux_losses) == {prefix + name for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(out.aux_losses[prefix + name].float(), value.float())
    weighted = sum(EVERY_LOSS[f"{name}_coefficient"] * value for name, value in expected.items())
    torch.testing.assert_close((out.loss - out.cross_entropy).float(), (weighted * 14 / 12).float())


def test_against_hf_mixtral():
    """A BTX top-2 mixture of Llamas is transformers' Mixtral: the same logits, loss and gradients."""
    models = tiny.dense_models("llama", dtype=torch.float32, attention_bias=False)
    mixture = tiny.mixture_of(models, **TOP2)
    seed = models[0].config
    shared = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps"
    shared += " max_position_embeddings rope_parameters hidden_act tie_word_embeddings"
    sizes = {name: getattr(seed, name) for name in shared.split()}
    mixtral = MixtralForCausalLM(
        MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2, sliding_window=None)
    )

    def renamed(tensors):
        return {n.replace("model.decoder.", "model.").replace("mlp.router", "mlp.gate"): t for n, t in tensors.items()}

    mixtral.load_state_dict(renamed(mixture.state_dict()))
    ids = tiny.tokens(2, 9)
    ours, theirs = mixture(ids, labels=ids), mixtral.eval()(ids, labels=ids)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)
    theirs.loss.backward()
    tiny.assert_same_tensors(renamed(gradients_after(ours.loss, mixture)), tiny.gradients_of(mixtral))


# ---------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("router", ["top1", "top2", "soft", "softmax_top2_sum_to_one"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", tiny.DENSE)
def test_copies_reproduce_seed(kind, attention, router):
    (seed,) = tiny.dense_models(kind, count=1)
    mixture = tiny.mixture_of([seed] * 3, **ROUTERS[router], **ATTENTION[attention])
    ids = tiny.tokens()
    torch.testing.assert_close(mixture(ids).logits.float(), seed(ids).logits.float())


@pytest.mark.parametrize("kind", FAMILIES)
def test_plain_gates_scale_the_feed_forward_down(kind):
    """BAM's paper form: with all router logits 0 the feed-forward output is 1/E of the seed's; `compensate` mends it."""
    (seed,) = tiny.dense_models(kind, count=1)
    zeros = [torch.zeros(3, 32, dtype=torch.float64)] * 2
    hidden = torch.randn(1, 4, 32, dtype=torch.float64)
    dense = getattr(seed, family_of(seed.config).decoder).layers[0].mlp(hidden)
    for scale, factor in (("none", 1 / 3), ("compensate", 1.0)):
        mixture = tiny.mixture_of([seed] * 3, zeros, router="softmax_topk", num_experts_per_tok=1, gate_scale=scale)
        torch.testing.assert_close(mixture.model.decoder.layers[0].mlp(hidden).float(), (factor * dense).float())


@pytest.mark.parametrize("router", ["top1", "top2", "soft"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", tiny.DENSE)
def test_one_hot_router_is_that_expert(kind, attention, router):
    """Forced to expert e: a dense Hugging Face model of the averaged tensors with e's MLPs (and attentions) inside."""
    models = tiny.dense_models(kind)
    choices = ATTENTION[attention]
    mixture = tiny.mixture_of(models, **ROUTERS[router], **choices)
    family, ids = family_of(mixture.config.seed), tiny.tokens()
    for expert, model in enumerate(models):
        dense = reference.average(models)
        for mine, layer in zip(
            getattr(dense, family.decoder).layers, getattr(model, family.decoder).layers, strict=True
        ):
            setattr(mine, family.mlp, layer.get_submodule(family.mlp))
            if choices["attention"] == "mixture":
                own, shared = copy.deepcopy(layer.get_submodule(family.attention)), mine.get_submodule(family.attention)
                if choices["kv"] == "shared":
                    own.load_state_dict(reference.attention_with_shared_kv(own, shared))
                setattr(mine, family.attention, own)
        out = mixture(ids, trace=RoutingTrace(forced=expert)).logits
        torch.testing.assert_close(out.float(), dense(ids).logits.float())


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", FAMILIES)
def test_later_tokens_change_no_earlier_logits(kind, attention):
    mixture = tiny.mixture_of(tiny.dense_models(kind), **TOP2, **ATTENTION[attention])
    ids = tiny.tokens(2, 8)
    before = mixture(ids).logits
    for t in (1, 4, 7):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % tiny.VOCAB
        after = mixture(changed).logits
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax((0, 2)).min() > 1e-3


# ---------------------------------------------------------------------------------------------------------- generation


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", FAMILIES)
def test_generation_is_the_same_with_every_cache(kind, attention, implementation):
    models = tiny.dense_models(kind, dtype=torch.float32)
    mixture = tiny.mixture_of(models, implementation=implementation, **TOP2, **ATTENTION[attention])
    ids = tiny.tokens(2, 5)
    expected = generate(mixture, ids, use_cache=False)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        out = generate(mixture, ids, **options)
        assert out.sequences.tolist() == expected.sequences.tolist()
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", FAMILIES)
def test_left_padded_rows_generate_as_if_alone(kind, attention, implementation):
    models = tiny.dense_models(kind, dtype=torch.float32)
    mixture = tiny.mixture_of(models, implementation=implementation, **TOP2, **ATTENTION[attention])
    ids, mask = tiny.tokens(2, 7), tiny.left_padding(0, 3, sequence=7)
    batch = generate(mixture, ids.masked_fill(mask == 0, 0), mask)
    for row, pad in enumerate((0, 3)):
        alone = generate(mixture, ids[row : row + 1, pad:])
        assert batch.sequences[row, 7:].tolist() == alone.sequences[0, 7 - pad :].tolist()
        torch.testing.assert_close(torch.stack(batch.logits)[:, row], torch.stack(alone.logits)[:, 0])


@pytest.mark.parametrize("kind", FAMILIES)
def test_prompt_without_mask_generates_as_the_dense_family_does(kind):
    """transformers infers a mask, and positions, from pad ids in the prompt; for the mixture as for a dense model."""
    (seed,) = tiny.dense_models(kind, count=1, dtype=torch.float32)
    mixture = tiny.mixture_of([seed] * 3, **TOP2)
    ids = tiny.tokens(2, 6)
    ids[0, :2] = ids[1, 3] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert mixture.generate(ids, **options).tolist() == seed.generate(ids, **options).tolist()
    assert mixture.generate(ids, **options).tolist() == mixture.generate(ids, use_cache=False, **options).tolist()


# ------------------------------------------------------------------------------------------------ training: checkpoint


def trainable(kind: str, attention: str, **changes) -> UpcycledForCausalLM:
    choices = TOP1 | ATTENTION[attention] | AUXILIARY | changes
    return tiny.mixture_of(tiny.dense_models(kind, dtype=torch.float32), **choices).train()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", FAMILIES)
def test_gradient_checkpointing_changes_nothing(kind, attention):
    """Two forwards before one backward; auxiliary losses included; every layer runs a second time."""
    mixture = trainable(kind, attention)
    first, second = tiny.tokens(2, 9, 0), tiny.tokens(2, 9, 1)

    def run():
        traces = [RoutingTrace(), RoutingTrace()]
        losses = [mixture(ids, labels=ids, trace=t).loss for ids, t in zip((first, second), traces, strict=True)]
        gradients = gradients_after(sum(losses), mixture)
        return gradients, [r.experts for t in traces for r in t.of("ffn")]

    expected, routing = run()
    mixture.activation_checkpointing_enable()
    runs = []
    for layer in mixture.model.decoder.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: runs.append(module))
    gradients, routing_again = run()
    assert len(runs) == 2 * 2 * 2  # layers x forwards x (forward, recomputation)
    tiny.assert_same_tensors(gradients, expected)
    for ours, theirs in zip(routing_again, routing, strict=True):
        assert torch.equal(ours, theirs)
    assert gradients["model.decoder.layers.0.mlp.router.weight"].abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("enable", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_reentrant_checkpointing_is_refused(enable):
    mixture = trainable("llama", "btx")
    with pytest.raises(ValueError, match="use_reentrant=True, expected False"):
        getattr(mixture, enable)({"use_reentrant": True})
    getattr(mixture, enable)({"use_reentrant": False})
    assert mixture.is_gradient_checkpointing


# -------------------------------------------------------------------------------------------------- training: precision


@pytest.mark.parametrize("implementation", CALLS_A_LAYER)
@pytest.mark.parametrize("kind", FAMILIES)
def test_experts_run_in_bf16_under_autocast(kind, implementation, monkeypatch):
    mixture = trainable(kind, "bam_expert")
    mixture.set_experts_implementation(implementation)
    ids, calls = tiny.tokens(), []
    expected = gradients_after(mixture(ids, labels=ids).loss, mixture)
    kernel_spies(monkeypatch, calls)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixture(ids, labels=ids, output_router_logits=True)
    assert {name for name, *_ in calls} == {implementation}
    assert {dtype for _, *dtypes in calls for dtype in dtypes} == {torch.bfloat16}
    assert all(t.dtype == torch.float32 for t in out.router_logits + out.attention_router_logits)
    gradients = gradients_after(out.loss, mixture)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        if "experts" in name:  # 8 bits of mantissa, and a token or two that route elsewhere
            assert (gradient - expected[name]).norm() < 0.2 * expected[name].norm(), name


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", FAMILIES)
def test_loading_in_bf16_keeps_routers_in_fp32(kind, attention, tmp_path):
    """Trained ones, and the biases and never trained weights that are buffers."""
    fixed = {"kind": "topk_softmax", "top_k": 2, "trained": False}
    mixture = trainable(kind, attention, router_options={"bias_rate": 0.1}, attention_router=fixed)
    for router in (module for module in mixture.modules() if isinstance(module, Router)):
        if router.bias is not None:
            router.bias.copy_(torch.tensor([0.001, 1 / 3, -0.7]))
    mixture.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = loaded.state_dict()
    for name, buffer in loaded.named_buffers():
        if name in kept:
            assert buffer.dtype == torch.float32, name
            exact(buffer, mixture.get_buffer(name))
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
        if ".router." in name:
            exact(parameter, mixture.get_parameter(name))
    out = loaded(tiny.tokens(), output_router_logits=True)
    assert out.logits.dtype == torch.bfloat16 and out.router_logits[0].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ training: loss


def accumulated(mixture, parts):
    """(Σ losses, gradients) of micro-batches of (ids, mask, labels), as a trainer with gradient accumulation runs them."""
    mixture.zero_grad()
    targets, total = sum((labels[:, 1:] != -100).sum() for *_, labels in parts), 0.0
    for ids, mask, labels in parts:
        loss = mixture(ids, mask, labels=labels, num_items_in_batch=targets).loss
        loss.backward()
        total = total + loss.detach()
    return total, tiny.gradients_of(mixture)


def micro_batches(mask):
    ids = tiny.tokens(*mask.shape)
    labels = ids.masked_fill(mask == 0, -100)
    return [(ids, mask, labels)], [(ids[:1], mask[:1], labels[:1]), (ids[1:], mask[1:], labels[1:])]


@pytest.mark.parametrize("attention", ATTENTION)
def test_micro_batches_sum_to_the_whole_batch(attention):
    mixture = trainable("llama", attention)
    whole, split = micro_batches(torch.ones(4, 9, dtype=torch.long))
    (loss, gradients), (split_loss, split_gradients) = accumulated(mixture, whole), accumulated(mixture, split)
    torch.testing.assert_close(split_loss, loss)
    tiny.assert_same_tensors(split_gradients, gradients)


@pytest.mark.parametrize(
    "coefficients",
    [
        {"balance_coefficient": 0.0, "z_coefficient": 0.0},
        AUXILIARY,
    ],
)
def test_micro_batches_with_padding_sum_to_the_whole_batch(coefficients):
    mixture = trainable("llama", "btx", **coefficients)
    whole, split = micro_batches(tiny.left_padding(6, 0, 4, 0).flip(1))
    (loss, gradients), (split_loss, split_gradients) = accumulated(mixture, whole), accumulated(mixture, split)
    torch.testing.assert_close(split_loss, loss)
    tiny.assert_same_tensors(split_gradients, gradients)


def test_the_whole_batch_in_one_micro_batch_needs_no_count():
    mixture = trainable("llama", "btx")
    ids = tiny.tokens()
    counted = mixture(ids, labels=ids, num_items_in_batch=ids[:, 1:].numel()).loss
    torch.testing.assert_close(counted, mixture(ids, labels=ids).loss)


def test_evaluation_loss_is_cross_entropy_alone():
    mixture, ids = trainable("llama", "btx"), tiny.tokens()
    assert mixture(ids, labels=ids).loss > mixture(ids, labels=ids).cross_entropy + 0.1
    out = mixture.eval()(ids, labels=ids)
    exact(out.loss, out.cross_entropy)
    nats, count = reference.next_token_cross_entropy(out.logits, ids)
    torch.testing.assert_close(out.loss, (nats / count).float())
    assert set(out.aux_losses) == {"balance", "z"}


def test_coefficient_zero_is_an_exact_no_op(monkeypatch):
    """Bit-equal gradients, and nothing is computed."""
    ids = tiny.tokens()
    off = dict.fromkeys(EVERY_LOSS, 0.0) | {"balance": "switch"}
    without = trainable("llama", "btx", **off | {"balance": "none"})
    expected = gradients_after(without(ids, labels=ids).loss, without)
    monkeypatch.setattr("upcycle.losses.balance_sum", None)
    for name in ("z_sum", "similarity_sum", "entropy_sum"):
        monkeypatch.setattr(f"upcycle.losses.{name}", None)
    mixture = trainable("llama", "btx", **off)
    out = mixture(ids, labels=ids)
    assert out.aux_losses == {}
    tiny.assert_same_tensors(gradients_after(out.loss, mixture), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_padding_changes_neither_loss_nor_gradients(kind):
    """Other ids under the padding: the same loss, auxiliary losses and gradients."""
    mixture = trainable(kind, "bam_expert")
    ids, mask = tiny.tokens(2, 9), tiny.left_padding(0, 4)
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 4] = -100
    out = mixture(ids, mask, labels=labels)
    expected = gradients_after(out.loss, mixture)
    other = mixture(torch.where(mask == 1, ids, (ids + 5) % tiny.VOCAB), mask, labels=labels)
    torch.testing.assert_close(other.loss, out.loss)
    tiny.assert_same_tensors(gradients_after(other.loss, mixture), expected)


# ------------------------------------------------------------------------------------------------ disk, config, the rest


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", FAMILIES)
def test_saving_and_loading_keeps_every_bit(kind, attention, tied, tmp_path):
    models = tiny.dense_models(kind, dtype=torch.float32, tie_word_embeddings=tied)
    mixture = tiny.mixture_of(models, **TOP1, **ATTENTION[attention], **AUXILIARY)
    mixture.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(loaded, UpcycledForCausalLM)
    tiny.assert_same_tensors(loaded.state_dict(), mixture.state_dict(), rtol=0, atol=0)
    ids = tiny.tokens()
    torch.testing.assert_close(loaded(ids).logits, mixture(ids).logits)
    exact(copy.deepcopy(loaded)(ids).logits, mixture(ids).logits)  # a file's tensors are aligned otherwise in memory
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.config.experts == ["seed", "code", "law"]
    ours, theirs = (config.to_dict() for config in (loaded.config, mixture.config))
    for noted_by_loading in ("_name_or_path", "dtype", "architectures"):
        ours.pop(noted_by_loading, None), theirs.pop(noted_by_loading, None)
        ours["seed"].pop(noted_by_loading, None), theirs["seed"].pop(noted_by_loading, None)
    assert ours == theirs


@pytest.mark.parametrize("kind", FAMILIES)
def test_auto_classes_load_config_and_base_model(kind, tmp_path):
    mixture = trainable(kind, "bam_shared").eval()
    mixture.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), UpcycledConfig)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, UpcycledModel)
    ids = tiny.tokens()
    exact(mixture.lm_head(base(ids).last_hidden_state), mixture(ids).logits)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", FAMILIES)
def test_hidden_states_attentions_and_router_logits_come_out(kind, attention):
    mixture = tiny.mixture_of(
        tiny.dense_models(kind, dtype=torch.float32), implementation="eager", **ATTENTION[attention]
    )
    ids = tiny.tokens(2, 5)
    out = mixture(ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 5, 32)] * 3
    heads = 4 if attention == "btx" else 12
    assert [tuple(a.shape) for a in out.attentions] == [(2, heads, 5, 5)] * 2
    assert [tuple(r.shape) for r in out.router_logits] == [(10, 3)] * 2
    assert len(out.attention_router_logits) == (0 if attention == "btx" else 2)
    exact(mixture.lm_head(out.hidden_states[-1]), out.logits)


def test_logits_to_keep_and_a_copy_of_the_model():
    mixture, ids = trainable("llama", "bam_expert").eval(), tiny.tokens()
    full = mixture(ids, labels=ids)
    torch.testing.assert_close(mixture(ids, logits_to_keep=1).logits, full.logits[:, -1:])
    exact(copy.deepcopy(mixture)(ids).logits, full.logits)


@pytest.mark.parametrize("kind", FAMILIES)
def test_input_embeddings_give_the_same_logits(kind):
    mixture, ids = trainable(kind, "bam_expert").eval(), tiny.tokens()
    embedded = mixture(inputs_embeds=mixture.get_input_embeddings()(ids)).logits
    exact(embedded, mixture(ids).logits)


def test_a_cache_can_be_handed_on():
    mixture, ids = trainable("gpt_neox", "bam_shared").eval(), tiny.tokens(2, 8)
    cache = DynamicCache(config=mixture.config)
    first = mixture(ids[:, :5], past_key_values=cache, use_cache=True)
    second = mixture(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), mixture(ids).logits)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", FAMILIES)
def test_initialisation_reaches_every_tensor(kind, attention):
    seed = tiny.dense_config(kind, hidden_size=64, intermediate_size=96).to_dict()
    model = UpcycledForCausalLM(UpcycledConfig(seed=seed, experts=["seed", "code"], **ATTENTION[attention]))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name.endswith("bias") or "_bias" in name:
            assert parameter.abs().max() == 0, name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.015 < parameter.std() < 0.025, name


def test_missing_routers_are_initialised_and_reported(tmp_path):
    mixture = trainable("llama", "btx")
    kept = {name: t for name, t in mixture.state_dict().items() if "router" not in name}
    mixture.save_pretrained(tmp_path, state_dict=kept)
    loaded, report = UpcycledForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(report["missing_keys"]) == [f"model.decoder.layers.{n}.mlp.router.weight" for n in range(2)]
    for name in report["missing_keys"]:
        assert 0.01 < loaded.get_parameter(name).std() < 0.03
    tiny.assert_same_tensors({n: t for n, t in loaded.state_dict().items() if n in kept}, kept, rtol=0, atol=0)


def test_config_refuses_a_name_twice():
    with pytest.raises(ValueError) as error:
        UpcycledConfig(experts=["seed", "code", "seed"])
    assert str(error.value) == "experts=['seed', 'code', 'seed'] has a name twice; experts need distinct names"


def test_config_refuses_more_experts_per_token_than_experts():
    with pytest.raises(ValueError) as error:
        UpcycledConfig(experts=["seed", "code", "law", "math"], num_experts_per_tok=6)
    assert str(error.value) == (
        "router.top_k (num_experts_per_tok)=6 is not between 1 and the 4 experts (seed, code, law, math); lower top_k or add a branch"
    )


@pytest.mark.parametrize("field", ["router", "gate_scale", "attention", "kv", "balance", "balance_scope"])
def test_config_refuses_an_unknown_choice(field):
    with pytest.raises(ValueError, match=field):
        UpcycledConfig(**{"attention": "mixture", field: "typo"})


def test_a_loop_that_tells_no_steps_is_warned(monkeypatch):
    """Biases would stay where they are, and a temperature at 1, without a word."""
    said, ids = [], tiny.tokens()
    monkeypatch.setattr("upcycle.modeling.logger.warning_once", said.append)
    for options in ({"router": "sample_top1"}, {"router_options": {"bias_rate": 0.1}}, {}):
        mixture = tiny.mixture_of(tiny.dense_models("llama", dtype=torch.float32), **options).train()
        mixture(ids, labels=ids, trace=RoutingTrace(step=1))
        mixture.eval()(ids, labels=ids)
        assert not said
        mixture.train()(ids, labels=ids)
        assert len(said) == bool(options)
        said.clear()


def test_a_trace_used_twice_never_reuses_a_stale_decision():
    """Refused, or routed afresh; silently routing new tokens by old decisions is neither."""
    mixture, trace = trainable("llama", "btx").eval(), RoutingTrace()
    mixture(tiny.tokens(rng_seed=0), trace=trace)
    ids = tiny.tokens(rng_seed=1)
    try:
        again = mixture(ids, trace=trace).logits
    except ValueError:
        return
    exact(again, mixture(ids).logits)


ELSEWHERE = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "upcycle":
                raise ModuleNotFoundError("No module named 'upcycle'", name="upcycle")

    sys.meta_path.insert(0, Blocker())
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    torch.set_num_threads(1)
    directory, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    ids = torch.load(f"{directory}/ids.pt")
    with torch.no_grad():
        logits = model(ids).logits
        hidden = AutoModel.from_pretrained(directory, trust_remote_code=True)(ids).last_hidden_state
        assert torch.equal(model.lm_head(hidden), logits)
    torch.save({"logits": logits, "sequences": model.generate(ids, max_new_tokens=3, min_new_tokens=3)}, out)
    model.save_pretrained(f"{directory}/again")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_checkpoint_loads_where_the_package_is_missing(kind, tmp_path):
    """The model's code travels with the weights: the same logits in a process that can't import `upcycle`."""
    mixture, ids = trainable(kind, "bam_shared").eval(), tiny.tokens()
    directory, out = tmp_path / "mixture", tmp_path / "elsewhere.pt"
    mixture.save_pretrained(directory)
    torch.save(ids, directory / "ids.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", textwrap.dedent(ELSEWHERE), str(directory), str(out)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(out)
    torch.testing.assert_close(theirs["logits"], mixture(ids).logits)
    assert theirs["sequences"].tolist() == mixture.generate(ids, max_new_tokens=3, min_new_tokens=3).tolist()
    assert {path.name for path in (directory / "again").glob("*.py")} == {path.name for path in directory.glob("*.py")}
