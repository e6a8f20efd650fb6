"""What a Hugging Face model directory consists of, without opening its weights. No torch, so that plans stay quick."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from upcycle.durable import file_hashes

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
)


def model_files(directory: Path) -> list[Path]:
    """The files that make up a model: weights, config and tokenizer."""
    wanted = [*sorted(directory.glob("*.safetensors")), directory / INDEX, directory / "config.json"]
    wanted += [directory / name for name in TOKENIZER_FILES]
    return [path for path in wanted if path.is_file()]


def fingerprint(directory: Path) -> dict[str, str]:
    """SHA-256 of each of its files, by name; read again only when a file has changed (durable.file_hashes)."""
    files = model_files(directory)
    return dict(zip((path.name for path in files), file_hashes(files), strict=True))


def tokenizer_sha256(directory: Path) -> str | None:
    """Hash of tokenizer.json (vocabulary and merges); None where there is none."""
    path = directory / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def copy_tokenizer(source: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
