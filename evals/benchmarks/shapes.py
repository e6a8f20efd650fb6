"""Sizes of the models that are measured. No torch.

E experts, K of them a token; B sequences of S tokens a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXPERTS, TOP_K = 4, 2


@dataclass(frozen=True)
class Size:
    """A seed's sizes, in the field's names, and the batch of one training step. held: several of them fit in memory at once."""

    name: str
    seed: dict[str, Any]
    sequences: int = 8
    length: int = 512
    held: bool = True

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def wider(self, feed_forward: int = 1, heads: int = 1) -> dict[str, Any]:
        """The sizes of a dense model with so many times the feed-forward width, and the attention heads."""
        seed = self.seed
        return seed | {
            "intermediate_size": feed_forward * seed["intermediate_size"],
            "num_attention_heads": heads * seed["num_attention_heads"],
            "num_key_value_heads": heads * seed["num_key_value_heads"],
            "head_dim": seed["hidden_size"] // seed["num_attention_heads"],
        }


SMALL = Size(
    "6 × 256",
    {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
)  # fmt: skip
SMOLLM2 = Size(
    "SmolLM2-135M",
    {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    held=False,
)  # fmt: skip
QUICK = Size(
    "tiny",
    {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
    },
    sequences=2,
    length=32,
)  # fmt: skip


def sizes(quick: bool) -> list[Size]:
    """Those that training is measured on."""
    return [QUICK] if quick else [SMALL, SMOLLM2]


def largest(quick: bool) -> Size:
    return QUICK if quick else SMOLLM2


def neox(size: Size, parallel: bool) -> Size:
    """A GPT-NeoX of the same widths, whose sublayers see one input side by side, or one after the other."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    seed = {name: size.seed[name] for name in names} | {
        "model_type": "gpt_neox", "use_parallel_residual": parallel, "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return Size(f"{size.name}, GPT-NeoX", seed, size.sequences, size.length, size.held)
