"""Hugging Face directories in and out, tensor by tensor, safetensors only; hashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from upcycle.directories import INDEX, model_files
from upcycle.durable import write_json

# Buffers that old checkpoints carry and today's models compute themselves, and names that have changed since.
IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")
TODAYS_NAMES = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX's head


class Checkpoint:
    """A directory of safetensors, read one tensor at a time, under the names that today's transformers uses.

    Raises ValueError: no such directory, no safetensors in it (pickles are never opened), a missing or broken shard.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        if not (self.directory / "config.json").is_file():
            raise ValueError(f"{self.directory}: no config.json there; expected a Hugging Face model directory")
        self.config: dict = json.loads((self.directory / "config.json").read_text())
        self._handles: dict[str, safe_open] = {}
        stored = {name: file for name, file in self._locate().items() if not IGNORED_TENSORS.search(name)}
        self._stored_names = {TODAYS_NAMES.get(name, name): name for name in stored}
        self.files = {name: stored[as_stored] for name, as_stored in self._stored_names.items()}

    def _locate(self) -> dict[str, str]:
        """Stored tensor name -> file name."""
        index = self.directory / INDEX
        if index.is_file():
            return dict(json.loads(index.read_text())["weight_map"])
        names = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if not names:
            pickles = sorted(path.name for path in self.directory.glob("*.bin"))
            found = f"found {', '.join(pickles[:5])}, which may run code when opened" if pickles else "found none"
            raise ValueError(
                f"{self.directory}: expected weights in safetensors, {found}; "
                "save the model again with save_pretrained (safetensors is its default)"
            )
        return {tensor: name for name in names for tensor in self._open(name).keys()}

    def _open(self, name: str):
        if name not in self._handles:
            path = self.directory / name
            if not path.is_file():
                raise ValueError(
                    f"{path}: the index names this shard but it is missing; copy the whole directory again"
                )
            try:
                self._handles[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
        return self._handles[name]

    @property
    def names(self) -> list[str]:
        return sorted(self.files)

    def get(self, name: str) -> Tensor:
        return self._open(self.files[name]).get_tensor(self._stored_names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self.files[name]).get_slice(self._stored_names[name]).get_shape())

    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor, in name order."""
        return self.get(self.names[0]).dtype


class CheckpointWriter:
    """Writes tensors into shards of at most `max_shard_bytes`, then the index. Memory: one shard."""

    def __init__(self, directory: Path, max_shard_bytes: int):
        self.directory, self.max_shard_bytes = directory, max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._pending_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def _shard(self, number: int) -> Path:
        return self.directory / f"shard-{number}.safetensors"

    def _flush(self) -> None:
        save_file(self._pending, self._shard(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, give the shards their final names and, if there are several, write the index."""
        self._flush()
        count, weight_map = len(self._shards), {}
        for number, names in enumerate(self._shards):
            final = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._shard(number), self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.directory / INDEX, index)


def tensor_sha256(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def import_checkpoint(source: Path, out: Path) -> None:
    """Copy a model's weights, config and tokenizer into `out`; every tensor must be readable.

    Raises ValueError: see Checkpoint.
    """
    checkpoint = Checkpoint(source)
    for name in checkpoint.names:
        checkpoint.shape(name)
    for path in model_files(source):
        shutil.copyfile(path, out / path.name)
