"""How fast this machine trains a model: a few steps of the training loop itself, on random tokens."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from upcycle.config import PhaseConfig, ScheduleConfig, TrainConfig
from upcycle.cost import Shape
from upcycle.store import Run
from upcycle.train import METRICS, train

WARM_UP, MEASURED = 2, 5  # steps: the first ones allocate and compile


def training_flops_per_second(model, config: TrainConfig) -> float:
    """FLOP/s, by cost.py's count, that training `model` reaches in the batches and the precision of `config`.

    The median of MEASURED steps after WARM_UP, so that another program's moment does not count. `model` is trained in place.
    """
    shape = Shape.of_config(model.config.to_dict())
    flops = shape.step_flops_per_token(config.sequence_length, config.micro_batch_sequences)
    steps = WARM_UP + MEASURED
    short = replace(
        config, tokens=steps * config.batch_tokens, proportions={"random": 1.0}, phases=(PhaseConfig(),),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0), max_epochs=float("inf"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data = {"random": random_domain(Path(folder) / "random", model.config.vocab_size, short)}
        run = Run(say=lambda text: None, checkpoint_seconds=None)
        train(model, short, data, Path(folder), run, flops).close()
        rows = [json.loads(line) for line in (Path(folder) / METRICS).read_text().splitlines()]
    return flops * median(row["tokens_per_second"] for row in rows[WARM_UP:])


def random_domain(directory: Path, vocab: int, config: TrainConfig) -> Path:
    """Tokens to train on as tokenize_documents leaves them, one document."""
    directory.mkdir()
    count = config.batch_tokens
    tokens = np.random.default_rng(0).integers(0, vocab, count).astype(np.uint32)
    for part, array in (("tokens", tokens), ("offsets", np.array([0, count])), ("bytes", np.array([count]))):
        np.save(directory / f"train.{part}.npy", array)
    return directory
