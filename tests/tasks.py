"""For tests of lm-eval's tasks: text that tokens are bytes of, models whose answers are known, and a stage for two ranks.

`accelerate launch ... tests/tasks.py JOB.json` runs one `run_tasks` stage on every rank.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import dense_models, mixture_of
from upcycle.config import ContinuationsConfig, TasksConfig

EOS = "<|endoftext|>"
SIZES = {"vocab_size": 257, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL = ContinuationsConfig(questions=16, choices=4, context_characters=40, continuation_characters=20)
WORDS = [
    "stone",
    "river",
    "apple",
    "wooden",
    "tall",
    "quick",
    "under",
    "never",
    "blue",
    "seven",
    "candle",
    "paper",
    "glass",
    "winter",
    "morning",
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; EOS is 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={EOS: 0} | {byte: n for n, byte in enumerate(alphabet, 1)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS)


def texts(documents: int = 12, words: int = 60, rng_seed: int = 0) -> list[str]:
    rng = np.random.default_rng(rng_seed)
    return [" ".join(rng.choice(WORDS, words)) for _ in range(documents)]


def dense(**changes) -> PreTrainedModel:
    return dense_models("llama", 1, dtype=torch.float32, **SIZES | changes)[0]


def mixture(**choices) -> PreTrainedModel:
    return mixture_of(dense_models("llama", 3, dtype=torch.float32, **SIZES), **choices)


class Reciter(PreTrainedModel):
    """Knows texts by heart: after a beginning of one, `certainty` is the logit of what follows; all else is 0."""

    config_class = LlamaConfig

    def __init__(self, known: list[list[int]], certainty: float = 20.0):
        super().__init__(LlamaConfig(**SIZES))
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.certainty = certainty
        self.follows = {tuple(text[:n]): text[n] for text in known for n in range(1, len(text))}

    def forward(self, input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, SIZES["vocab_size"])
        for row, ids in enumerate(input_ids.tolist()):
            for n in range(len(ids)):
                if (token := self.follows.get(tuple(ids[: n + 1]))) is not None:
                    logits[row, n, token] = self.certainty
        return SimpleNamespace(logits=logits)


def main() -> None:
    from evals.stages import run_tasks
    from upcycle.store import Run
    from upcycle.team import join, leave

    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    team, out = join(), Path(job["out"])
    questions = {domain: Path(path) for domain, path in job["questions"].items()}
    run_tasks(TasksConfig(names=("continuations",)), out=out, run=Run(team=team), model=Path(job["model"]), questions=questions)  # fmt: skip
    (out / f"ranks-{team.rank}-of-{team.size}").touch()
    leave()


if __name__ == "__main__":
    main()
