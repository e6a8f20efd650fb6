"""What a CUDA device must give: kernels that agree with the plain forms, and steps that never wait for the device.

`pytest -m gpu -n 0`; left out otherwise. Nothing here has been run on a GPU yet.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

from tests.tiny import VOCAB, dense_models, gradients_of, mixture_of, tokens
from upcycle.batches import Batches
from upcycle.config import OptimizerConfig, ScheduleConfig, TrainConfig
from upcycle.engine import PlainEngine
from upcycle.families import family_of
from upcycle.modeling import UpcycledForCausalLM
from upcycle.team import ALONE
from upcycle.train import Loop, Objective

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("UPCYCLE_GPU_TESTS_ON", "cuda")  # "cpu" tries the tests themselves, those that need no CUDA
CHOICES = {
    "btx": {"router": "topk_softmax", "num_experts_per_tok": 2},
    "bam": {"attention": "mixture"},
    "bam_shared_kv": {"attention": "mixture", "kv": "shared"},
}
BF16 = 0.03  # share of the largest value: rounding to 8 bits, over two layers


@pytest.fixture(params=CHOICES)
def choices(request):
    return {"balance": "btx", "balance_coefficient": 0.01} | CHOICES[request.param]


def on_device(choices: dict, dtype=torch.float32, device: str = DEVICE, **more) -> UpcycledForCausalLM:
    """Widths that grouped_mm takes: rows of a multiple of 16 bytes."""
    models = dense_models("llama", 3, dtype=torch.float32, intermediate_size=64)
    return mixture_of(models, **choices, **more).to(device, dtype)


def outputs(
    model: UpcycledForCausalLM, autocast: bool = False, device: str = DEVICE
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of a training step's loss."""
    ids = tokens(4, 16).to(device)
    model.train()
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach().float(), gradients_of(model)


def assert_near(found, expected, share: float) -> None:
    """Logits and all gradients, each within a share of its largest value."""
    pairs = {"logits": (found[0], expected[0])} | {name: (found[1][name], one) for name, one in expected[1].items()}
    for name, (one, other) in pairs.items():
        assert (one.float() - other.float()).abs().max() <= share * other.float().abs().max() + 1e-6, name


def test_grouped_experts_are_the_plain_ones(choices):
    """In bf16, which the grouped kernel is made for; the loop over experts is what it is held against."""
    model = on_device(choices, torch.bfloat16)
    model.set_experts_implementation("eager")
    plain = outputs(model)
    model.set_experts_implementation("grouped_mm")
    assert model.config._experts_implementation == "grouped_mm"
    assert_near(outputs(model), plain, BF16)


def test_grouped_experts_under_autocast_are_the_plain_ones(choices):
    model = on_device(choices)
    model.set_experts_implementation("eager")
    plain = outputs(model, autocast=True)
    model.set_experts_implementation("grouped_mm")
    assert_near(outputs(model, autocast=True), plain, BF16)


def test_sdpa_is_eager_attention(choices):
    eager = outputs(on_device(choices, implementation="eager"))
    assert_near(outputs(on_device(choices, implementation="sdpa")), eager, 1e-3)


def test_torchs_flash_kernel_is_eager_attention(choices):
    eager = outputs(on_device(choices, torch.bfloat16, implementation="eager"))
    model = on_device(choices, torch.bfloat16, implementation="sdpa")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert_near(outputs(model), eager, BF16)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs the package flash-attn")
def test_flash_attention_is_eager_attention(choices):
    eager = outputs(on_device(choices, torch.bfloat16, implementation="eager"))
    assert_near(outputs(on_device(choices, torch.bfloat16, implementation="flash_attention_2")), eager, BF16)


def test_flex_attention_is_sdpa(choices):
    sdpa = outputs(on_device(choices, implementation="sdpa"))
    assert_near(outputs(on_device(choices, implementation="flex_attention")), sdpa, 1e-3)


def test_compiled_layers_are_the_plain_ones(choices):
    model = on_device(choices)
    plain = outputs(model)
    for layer in getattr(model.model.decoder, family_of(model.config.seed).layers):
        layer.compile()
    assert_near(outputs(model), plain, 1e-3)


def test_autocast_is_near_fp32_and_keeps_fp32_gradients(choices):
    model = on_device(choices)
    full, half = outputs(model), outputs(model, autocast=True)
    assert all(gradient.dtype == torch.float32 for gradient in half[1].values())
    difference = (half[0] - full[0]).norm() / full[0].norm()  # a token between two experts may go to the other
    assert difference < 0.1


def loop_of(model: UpcycledForCausalLM, folder: Path, precision: str = "bf16") -> Loop:
    count = 64 * 16
    arrays = {"tokens": np.random.default_rng(0).integers(3, VOCAB, count).astype(np.uint16)}
    arrays |= {"offsets": np.array([0, count]), "bytes": np.array([count])}
    for part, array in arrays.items():
        np.save(folder / f"train.{part}.npy", array)
    config = TrainConfig(
        tokens=10**6, proportions={"text": 1.0}, sequence_length=16, batch_sequences=4, micro_batch_sequences=2, lr=1e-3,
        schedule=ScheduleConfig(kind="constant", warmup_steps=0), optimizer=OptimizerConfig(), precision=precision, max_epochs=1e9,
    )  # fmt: skip
    batches = Batches({"text": folder}, config.proportions, 16, 4, 1, max_epochs=1e9)
    model.train()
    return Loop(config, PlainEngine(Objective(model, precision, 1), config, ALONE), batches)


def test_forward_and_backward_never_wait_for_the_device(choices, tmp_path):
    """From a batch that is there to its gradients; the loop itself reads one loss and one norm a step, to see that they are finite."""
    if DEVICE == "cpu":
        pytest.skip("waiting for a device is CUDA's")
    loop = loop_of(on_device(choices), tmp_path)
    loop.begin(0, None)
    loop.step(0)  # allocates, chooses kernels
    (rows, domains), *_ = loop.micro_batches(1)
    counts = [torch.tensor(number, device=DEVICE) for number in (60, 64)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = loop.engine.forward(rows, domains, *counts, 1)
        loop.engine.backward(parts["loss"], last=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad is not None for parameter in loop.engine.model.parameters() if parameter.requires_grad)


def test_the_device_computes_what_the_processor_does(choices):
    assert_near(outputs(on_device(choices)), outputs(on_device(choices, device="cpu"), device="cpu"), 1e-3)


def test_the_loop_trains_on_the_device(choices, tmp_path):
    loop = loop_of(on_device(choices), tmp_path)
    loop.begin(0, None)
    losses = [loop.step(0)["loss"].item() for _ in range(8)]  # one batch, again and again
    assert losses[-1] < losses[0] and next(loop.engine.model.parameters()).device.type == DEVICE
