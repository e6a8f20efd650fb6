"""Kernels for training on CPUs: attention in blocks against a loop over queries, sorted experts against "eager"."""

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests import reference
from tests.tiny import FAMILY_CONFIGS, dense_models, gradients_of, left_padding, mixture_of, tokens
from upcycle import cpu_kernels
from upcycle.cpu_kernels import CAUSAL_BLOCKS, SORTED_MM, causal_blocks_forward, use_cpu_kernels

# heads, key/value heads, sequence, head size: one block, several, the last one shorter; shared keys and values
SHAPES = [(2, 2, 4, 3), (2, 1, 12, 3), (4, 2, 11, 6), (3, 1, 1, 2)]
WINDOWS_ONLY, SOFT_CAPPED = (
    ("mistral", "phi3", "starcoder2"),
    ("gemma2",),
)  # families whose layers all do what SDPA, or eager, has to do


def module(groups: int = 1) -> nn.Module:
    found = nn.Module()
    found.is_causal, found.num_key_value_groups = True, groups  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return found


def inputs(heads, kv_heads, sequence, size, dtype=torch.float64, spread=1.0, batch=2):
    generator = torch.Generator().manual_seed(0)

    def draw(count, times):
        shape = (batch, sequence, count, size)  # the layout in which projections come
        drawn = times * torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).transpose(1, 2).requires_grad_()

    return draw(heads, spread), draw(kv_heads, spread), draw(kv_heads, 1.0)


def with_gradients(function, tensors):
    out = function(*tensors)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, weights)]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "sequence", "size"), SHAPES)
def test_blocks_are_causal_attention(heads, kv_heads, sequence, size, kept, monkeypatch):
    """Whether probabilities are kept for the backward or computed again."""
    monkeypatch.setattr(cpu_kernels, "BLOCK", 4)
    monkeypatch.setattr(cpu_kernels, "KEPT_PER_SIZE", 100 if kept else 0)
    tensors = inputs(heads, kv_heads, sequence, size)
    scale = 0.7
    ours = with_gradients(lambda *qkv: causal_blocks_forward(module(), *qkv, None, scaling=scale)[0], tensors)
    slow = with_gradients(lambda *qkv: reference.causal_attention(*qkv, scale), tensors)
    for found, expected in zip(ours, slow, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_in_bf16_errors_are_of_the_size_of_sdpas(spread):
    """Output and gradients; scores that were rounded to bf16 would be off ten times as much where they are large."""
    tensors = inputs(4, 2, 300, 64, torch.bfloat16, spread)
    exact = inputs(4, 2, 300, 64, torch.bfloat16, spread)
    doubles = [one.detach().double().requires_grad_() for one in exact]

    def sdpa(*qkv):
        return scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True).transpose(1, 2)

    truth = with_gradients(sdpa, doubles)
    ours = with_gradients(lambda *qkv: causal_blocks_forward(module(2), *qkv, None)[0], tensors)
    theirs = with_gradients(sdpa, tensors)
    for own, other, true in zip(ours, theirs, truth, strict=True):
        assert own.dtype == torch.bfloat16
        assert (own.double() - true).norm() <= 1.6 * (other.double() - true).norm()


def test_what_is_not_plain_causal_training_is_sdpas():
    query, key, value = inputs(4, 2, 9, 8, torch.float32)
    above = torch.ones(9, 9, dtype=torch.bool).tril()
    cases = [
        ((query, key, value, above), {}),
        ((query, key, value, None), {"is_causal": False}),
        ((query[:, :, -1:], key, value, None), {}),
        ((query.detach(), key.detach(), value.detach(), None), {}),
    ]
    for tensors, options in cases:
        ours, _ = causal_blocks_forward(module(2), *tensors, **options)
        theirs, _ = sdpa_attention_forward(module(2), *tensors, **options)
        assert torch.equal(ours, theirs) and "CausalBlocks" not in str(ours.grad_fn)
    torch.manual_seed(0)
    dropped, _ = causal_blocks_forward(module(2), query, key, value, None, dropout=0.5)
    assert "CausalBlocks" not in str(dropped.grad_fn)
    plain, _ = causal_blocks_forward(module(2), query, key, value, None)
    assert "CausalBlocks" in str(plain.grad_fn)


def test_under_autocast_everything_is_bf16():
    """Queries and keys leave the rotary embedding in fp32, values the projection in bf16."""
    query, key, value = inputs(4, 4, 9, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = causal_blocks_forward(module(), query, key, value.bfloat16(), None)
    same, _ = causal_blocks_forward(module(), query.bfloat16(), key.bfloat16(), value.bfloat16(), None)
    assert out.dtype == torch.bfloat16 and torch.equal(out, same)
    (gradient,) = torch.autograd.grad(out.float().sum(), query)
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


def step_of(model, calls=None):
    """Logits and gradients of a training step."""
    model.train().zero_grad()
    ids = tokens(2, 9)
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), gradients_of(model)


def count_calls(monkeypatch, name):
    calls, own = [], getattr(cpu_kernels, name)
    monkeypatch.setattr(cpu_kernels, name, lambda *given: calls.append(1) or own(*given))
    return calls


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_every_family_trains_as_with_sdpa(family, mixed, monkeypatch):
    models = dense_models(f"family/{family}", 2)
    model = mixture_of(models, implementation=None, attention="mixture") if mixed else models[0]
    before = step_of(model)
    use_cpu_kernels(model)
    calls = count_calls(monkeypatch, "_probabilities")
    after = step_of(model)
    assert bool(calls) == (family not in WINDOWS_ONLY + SOFT_CAPPED)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_mixtures_train_as_with_sdpa_and_eager_experts(kind, kv, monkeypatch):
    model = mixture_of(dense_models(kind), attention="mixture", kv=kv, router="topk_softmax", num_experts_per_tok=2)
    before = step_of(model)
    use_cpu_kernels(model)
    assert model.config._experts_implementation == "eager"  # asked for, and kept
    model.set_experts_implementation(SORTED_MM)
    calls = count_calls(monkeypatch, "_probabilities")
    after = step_of(model)
    assert len(calls) == 2  # a block in each layer; its probabilities are kept
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


def test_experts_without_a_token_and_tokens_without_a_place():
    """switch drops what is over capacity; an expert that nobody takes has gradient 0."""
    model = mixture_of(dense_models("llama"), router="switch", capacity_factor=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.router.weight"):
                parameter[1:] = parameter[0] - 100 * parameter[0].sign()
    before = step_of(model)
    model.set_experts_implementation(SORTED_MM)
    after = step_of(model)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


def test_padding_keeps_its_mask():
    (model,) = dense_models("llama", 1)
    model.train()
    ids, mask = tokens(2, 9), left_padding(0, 4)
    before = model(input_ids=ids, attention_mask=mask).logits
    use_cpu_kernels(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


def test_other_kernels_stay_and_checkpoints_say_nothing_of_these(tmp_path):
    eager = mixture_of(dense_models("llama"), implementation="eager")
    use_cpu_kernels(eager)
    assert (eager.config._attn_implementation, eager.config._experts_implementation) == ("eager", "eager")
    model = mixture_of(dense_models("llama", dtype=torch.float32), attention="mixture")
    use_cpu_kernels(model)
    assert (model.config._attn_implementation, model.config._experts_implementation) == (CAUSAL_BLOCKS, SORTED_MM)
    assert model.model.decoder.config._attn_implementation == CAUSAL_BLOCKS
    model.save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    assert json.loads(written) and CAUSAL_BLOCKS not in written and SORTED_MM not in written


def test_compiled_layers_compute_the_same():
    model = mixture_of(dense_models("llama", dtype=torch.float32), attention="mixture", router="topk_softmax")
    use_cpu_kernels(model)
    before = step_of(model)
    for layer in model.model.decoder.layers:
        layer.compile(backend="aot_eager")
    torch.testing.assert_close(step_of(model), before, rtol=1e-4, atol=1e-5)
