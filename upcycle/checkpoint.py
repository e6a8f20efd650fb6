"""Hugging Face directories in and out, tensor by tensor, safetensors only; hashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from upcycle.directories import INDEX, SINGLE, check_room, indexed_tensors, model_files, read_config, weight_files
from upcycle.durable import write_json
from upcycle.store import ignore
from upcycle.tensor_file import TensorFile

# Buffers that old checkpoints carry and today's models compute themselves, and names that have changed since.
IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$|\.(attention|attn)\.(masked_)?bias$")
TODAYS_NAMES = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX's head
SAVED_WITHOUT = {"gpt2": "transformer."}  # OpenAI's own GPT-2 was saved from the class without a head
EMBEDDINGS = (".embed_tokens.weight", ".embed_in.weight", ".wte.weight")
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' words, torch's


class Checkpoint:
    """A directory of safetensors, read one tensor at a time, under the names that today's transformers uses.

    Raises ValueError: no model there, quantised, no safetensors in it (pickles are never opened), a missing or broken
    shard, a shard that does not hold what the index says.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self._opened: dict[str, TensorFile] = {}
        files = [path.name for path in weight_files(self.directory)]
        self._index = indexed_tensors(self.directory)
        located = self._index or self._held_by(files)
        stored = {name: file for name, file in located.items() if not IGNORED_TENSORS.search(name)}
        prefix = SAVED_WITHOUT.get(self.config["model_type"], "")
        if any(name.startswith(prefix) for name in stored):
            prefix = ""
        self._stored_names = {TODAYS_NAMES.get(name, prefix + name): name for name in stored}
        self.files = {name: stored[as_stored] for name, as_stored in self._stored_names.items()}
        if self._head_is_a_copy():
            del self.files["lm_head.weight"]

    def _head_is_a_copy(self) -> bool:
        """Some tools store a tied head under its own name too."""
        embedding = next((name for name in self.files if name.endswith(EMBEDDINGS)), None)
        if not self.config.get("tie_word_embeddings") or "lm_head.weight" not in self.files or embedding is None:
            return False
        return torch.equal(self.get("lm_head.weight"), self.get(embedding))

    def _held_by(self, files: list[str]) -> dict[str, str]:
        """Stored tensor name -> file name, of files without an index."""
        located: dict[str, str] = {}
        for file in files:
            for name in sorted(self._open(file).names):
                if name in located:
                    raise ValueError(
                        f"{self.directory}: {name} is in {located[name]} and in {file}; remove one of them"
                    )
                located[name] = file
        return located

    def _open(self, name: str) -> TensorFile:
        if name not in self._opened:
            path = self.directory / name
            try:
                self._opened[name] = TensorFile(path)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
            if self._index is not None:
                self._check_index(name, self._opened[name].names)
        return self._opened[name]

    def _check_index(self, file: str, held: set[str]) -> None:
        assert self._index is not None
        promised = {tensor for tensor, where in self._index.items() if where == file}
        for odd, problem in (
            (promised - held, f"are not in it although {INDEX} says so"),
            (held - promised, f"are in it and not in {INDEX}"),
        ):
            if odd:
                raise ValueError(
                    f"{self.directory / file}: {', '.join(sorted(odd)[:5])} ({len(odd)} in all) {problem}; the shard and "
                    "the index are of different models, copy the whole directory again"
                )

    def check(self) -> None:
        """Open every shard and look at every header.

        Raises ValueError: a shard that is not whole or not the index's; tensors that are no floating-point numbers.
        """
        odd = {name: dtype for name in self.names if (dtype := self.stored_dtype(name)) not in DTYPES}
        if odd:
            shown = ", ".join(f"{name} is {dtype}" for name, dtype in list(odd.items())[:5])
            raise ValueError(
                f"{self.directory}: {shown} ({len(odd)} in all), expected {', '.join(DTYPES)}: quantised or integer weights "
                "cannot be averaged or trained; load the model, call model.dequantize() and save_pretrained it elsewhere"
            )

    @property
    def names(self) -> list[str]:
        return sorted(self.files)

    def get(self, name: str) -> Tensor:
        """The file's pages, which are read when they are looked at and let go of with the tensor."""
        return self._open(self.files[name]).get(self._stored_names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._open(self.files[name]).shape(self._stored_names[name])

    def stored_name(self, name: str) -> str:
        """What the file calls it."""
        return self._stored_names[name]

    def stored_dtype(self, name: str) -> str:
        """As safetensors calls it: F32, BF16, ..."""
        return self._open(self.files[name]).dtype(self._stored_names[name])

    def size_bytes(self) -> int:
        """Of its weight files."""
        return sum((self.directory / name).stat().st_size for name in set(self.files.values()))

    def dtype(self) -> torch.dtype:
        """The dtype of most of its tensors."""
        return getattr(torch, DTYPES[Counter(self.stored_dtype(name) for name in self.names).most_common(1)[0][0]])


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all values are finite, and would be in `dtype`; without a copy of the tensor."""
    ends = torch.stack(tensor.aminmax()) if tensor.numel() else torch.zeros(1)
    return bool(torch.isfinite(ends.to(dtype or tensor.dtype)).all())


def finite(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    """The tensor as stored. Raises ValueError: NaN or infinite values; values that `dtype` cannot hold."""
    tensor = checkpoint.get(name)
    if not is_finite(tensor):
        raise ValueError(f"{checkpoint.directory}: {name} holds NaN or infinite values; mend that checkpoint")
    if not is_finite(tensor, dtype):
        kind, largest = str(dtype).removeprefix("torch."), tensor.abs().max().item()
        raise ValueError(
            f"{checkpoint.directory}: {name} holds {largest:.4g}, more than {kind} can; choose assemble.dtype=bfloat16 or float32"
        )
    return tensor


class Stored:
    """A tensor of a checkpoint that is read where its values are asked for, and kept by nobody."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self.checkpoint, self.name, self.shape = checkpoint, name, torch.Size(checkpoint.shape(name))
        self._finite = False

    def float(self) -> Tensor:
        """In fp32. Raises ValueError: NaN or infinite values, there or as stored."""
        return self.mapped().float()

    def mapped(self) -> Tensor:
        """As stored; its pages are read when they are looked at, the first time here. Raises ValueError: as `float`."""
        found = self.checkpoint.get(self.name) if self._finite else finite(self.checkpoint, self.name, torch.float32)
        self._finite = True
        return found


COPIED_BYTES = 16 * 2**20  # at a time
STORED_AS = {name: code for code, name in DTYPES.items()} | {
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class _Waiting:
    """A tensor whose shard is not complete: what the shard's header says of it, and where its bytes wait."""

    dtype: str
    shape: list[int]
    start: int
    size: int


def write_shard(path: Path, tensors: Mapping[str, _Waiting], data: IO[bytes]) -> None:
    """A safetensors file of tensors whose bytes wait in `data`. Wide numbers come first, as safetensors has it: so each tensor
    lies where its kind of number may."""
    order = sorted(tensors, key=lambda name: -getattr(torch, tensors[name].dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        one = tensors[name]
        header[name] = {"dtype": STORED_AS[one.dtype], "shape": one.shape, "data_offsets": [end, end + one.size]}
        end += one.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data.seek(tensors[name].start)
            for start in range(0, tensors[name].size, COPIED_BYTES):
                file.write(data.read(min(COPIED_BYTES, tensors[name].size - start)))


class CheckpointWriter:
    """Writes tensors into shards of at most `max_shard_bytes`, then the index. Memory: one tensor.

    safetensors' own functions want all tensors of a file at once; here they go to a file without a name one after the other,
    and from there, behind the header that only then is known, into the shard.
    total_bytes: what is going to be written, if known, so that a disk without the room is noticed before any work. stem: what
    the files' names begin with.
    Raises ValueError: a directory that cannot be written to; a disk without the room.
    """

    def __init__(self, directory: Path, max_shard_bytes: int, total_bytes: int = 0, stem: str = "model"):
        check_room(
            directory, total_bytes + min(total_bytes, max_shard_bytes)
        )  # a shard is written beside what waits for it
        self.directory, self.max_shard_bytes, self.stem = directory, max_shard_bytes, stem
        self._data = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (closed by `close`)
        self._pending: dict[str, _Waiting] = {}
        self._shards: list[list[str]] = []
        self._pending_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = _Waiting(
            str(tensor.dtype).removeprefix("torch."), list(tensor.shape), self._pending_bytes, size
        )
        with self._writing(size):
            self._data.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._pending_bytes += size
        self._total_bytes += size

    @contextmanager
    def _writing(self, size: int) -> Iterator[None]:
        """Raises ValueError: what is inside could not write its bytes."""
        try:
            check_room(self.directory, size)
            yield
        except OSError as error:
            shard = self._shard(len(self._shards))
            raise ValueError(f"{shard}: could not write its {size:,} bytes ({error.strerror})") from None

    def _shard(self, number: int) -> Path:
        return self.directory / f"shard-{number}.safetensors"

    def _flush(self) -> None:
        with self._writing(self._pending_bytes):
            write_shard(self._shard(len(self._shards)), self._pending, self._data)
        self._shards.append(list(self._pending))
        self._data.seek(0)
        self._data.truncate()
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, give the shards their final names and, if there are several, write the index."""
        self._flush()
        self._data.close()
        count, weight_map = len(self._shards), {}
        for number, names in enumerate(self._shards):
            place = "" if count == 1 else f"-{number + 1:05d}-of-{count:05d}"
            final = f"{self.stem}{place}.safetensors"
            os.replace(self._shard(number), self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.directory / f"{self.stem}.safetensors.index.json", index)


def overwrite_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Other values for fp32 tensors of a checkpoint, written where the old ones lie in its files."""
    files = indexed_tensors(directory) or dict.fromkeys(tensors, SINGLE)
    for name, tensor in tensors.items():
        with (directory / files[name]).open("r+b") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))[name]
            assert (header["dtype"], header["shape"]) == ("F32", list(tensor.shape)) and tensor.dtype == torch.float32
            file.seek(8 + header_bytes + header["data_offsets"][0])
            file.write(tensor.contiguous().numpy().astype("<f4").tobytes())


def tensor_sha256(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def import_checkpoint(source: Path, out: Path, advance: Callable[..., None] = ignore) -> None:
    """Copy a model's weights, config, tokenizer and generation settings into `out`, links as what they point to.

    advance: called with the bytes copied so far and in all.
    Raises ValueError: see Checkpoint; tensors of other dtypes; no room in `out`, or not to be written to.
    """
    checkpoint = Checkpoint(source)
    checkpoint.check()
    files = model_files(source)
    total_bytes = sum(path.stat().st_size for path in files)
    check_room(out, total_bytes)
    done = 0
    for path in files:
        try:
            shutil.copyfile(path, out / path.name)
        except OSError as error:
            raise ValueError(
                f"{out / path.name}: could not write its {path.stat().st_size:,} bytes ({error.strerror}); "
                f"{source} needs {total_bytes:,} bytes there"
            ) from None
        done += path.stat().st_size
        advance(done, total_bytes)
    _name_as_transformers_does(out, checkpoint)


def _name_as_transformers_does(out: Path, checkpoint: Checkpoint) -> None:
    """Weights without an index may have any names here; `from_pretrained` wants its own, or an index."""
    names = sorted({checkpoint.directory / name for name in checkpoint.files.values()})
    if (out / INDEX).is_file() or [path.name for path in names] == [SINGLE]:
        return
    if len(names) == 1:
        os.replace(out / names[0].name, out / SINGLE)
    else:
        weight_map = {checkpoint.stored_name(name): file for name, file in checkpoint.files.items()}
        write_json(out / INDEX, {"metadata": {"total_size": checkpoint.size_bytes()}, "weight_map": weight_map})
