"""What a Hugging Face model directory consists of, without opening its weights. No torch, so that plans stay quick."""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from upcycle.durable import file_hashes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDS = "model-*-of-*.safetensors"
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
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_NAME = re.compile(r"(?P<model>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")


def resolve(source: str | Path, cache: Path | None = None) -> Path:
    """The directory of a model: `source` itself, or what the Hub holds under the name org/name[@revision].

    A Hub name is looked for in the Hub's cache (`cache`: another one) and downloaded if that is allowed
    (HF_HUB_OFFLINE): config, tokenizer and safetensors only. A model's folder inside a cache (models--org--name) stands
    for the snapshot of its main branch.
    Raises ValueError: no such directory, and nothing on the Hub or in its cache either.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _main_snapshot(path) if (path / "snapshots").is_dir() else path
    if path.exists():
        raise ValueError(f"{source}: is a file, expected a model directory; give the directory that holds it")
    name = HUB_NAME.fullmatch(str(source))
    if name is None:
        raise ValueError(
            f"{source}: no such directory, and not the name of a model on the Hub (org/name or org/name@revision); "
            "check the path"
        )
    return _downloaded(name["model"], name["revision"], cache)


def _main_snapshot(folder: Path) -> Path:
    """The one snapshot of a folder of the Hub's cache that its main branch means."""
    main = folder / "refs" / "main"
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    if main.is_file():
        snapshots = [folder / "snapshots" / main.read_text().strip()]
    if len(snapshots) != 1 or not snapshots[0].is_dir():
        raise ValueError(
            f"{folder}: a folder of the Hub's cache with {len(snapshots)} snapshots and no whole main branch; give the "
            "directory of one snapshot"
        )
    return snapshots[0]


@lru_cache(maxsize=64)  # one run means one revision, even while the Hub's main branch moves
def _downloaded(model: str, revision: str | None, cache: Path | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    where = cache or Path(constants.HF_HUB_CACHE)
    try:
        found = Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=where,
                allow_patterns=[SINGLE, SHARDS, INDEX, "config.json", *COMPANIONS],
            )
        )
    except Exception as error:  # many kinds, of several libraries
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE=1 forbids downloads"
        name = model if revision is None else f"{model}@{revision}"
        raise ValueError(
            f"{name}: no directory {Path(name).absolute()}, and the Hub's model {name} is not whole in the cache {where} "
            f"and was not downloaded ({reason}); check the name, or fetch it where the Hub can be reached "
            f"(hf download {model}{f' --revision {revision}' if revision else ''})"
        ) from None
    return found


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a whole model with plain weights.

    Raises ValueError: no config.json, not that of a model, or quantised weights.
    """
    path = directory / "config.json"
    if not path.is_file():
        adapter = (directory / "adapter_config.json").is_file()
        found = " (it holds an adapter: merge that into its model and save the whole)" if adapter else ""
        raise ValueError(f"{directory}: no config.json there; expected a Hugging Face model directory{found}")
    try:
        config = json.loads(path.read_text())
        named = isinstance(config["model_type"], str)
    except ValueError as error:  # no JSON, no UTF-8
        raise ValueError(f"{path}: not whole JSON ({error}); copy it again") from None
    except (KeyError, TypeError):  # no dict
        named = False
    if not named:
        raise ValueError(f"{path} names no model_type, expected a Hugging Face config; save the model again")
    for field in ("quantization_config", "compression_config"):
        if quantised := config.get(field):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise ValueError(
                f"{directory}: {field} in config.json says that the weights are quantised ({method}), expected plain "
                "float32, bfloat16 or float16; load it, call model.dequantize(), delete model.config.quantization_config "
                "and save_pretrained it elsewhere"
            )
    return config


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, else model.safetensors, else files of other names.

    Like transformers, it leaves files of other names alone where there is an index or a model.safetensors.
    Raises ValueError: none (pickles are never opened); a shard is missing; a shard that no index names.
    """
    indexed, single = indexed_tensors(directory), directory / SINGLE
    shards = {path.name for path in directory.glob(SHARDS)}
    if indexed is not None:
        names = sorted(set(indexed.values()))
        if single.is_file() and SINGLE not in names:
            raise ValueError(
                f"{directory}: has both {SINGLE} and {INDEX}, and transformers reads only the first; remove the older one"
            )
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(
                f"{directory / missing[0]}: the index names this shard but it is missing{more}; copy the whole directory "
                "again"
            )
    else:
        others = {path.name for path in directory.glob("*.safetensors")} - shards
        names = [SINGLE] if single.is_file() else sorted(others)
    if strays := sorted(shards - set(names)):
        raise ValueError(
            f"{directory}: {', '.join(strays[:5])} ({len(strays)} in all) stand{'s' * (len(strays) == 1)} in no {INDEX}; "
            "copy the index too, or remove what is left of another model"
        )
    if not names:
        pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
        found = f"found {', '.join(pickles[:5])}, which may run code when opened" if pickles else "found none"
        raise ValueError(
            f"{directory}: expected weights in safetensors, {found}; "
            "save the model again with save_pretrained (safetensors is its default)"
        )
    return [directory / name for name in names]


def indexed_tensors(directory: Path) -> dict[str, str] | None:
    """Stored tensor name -> file name, as the index says; None where there is no index.

    Raises ValueError: not an index, or files outside the directory.
    """
    path = directory / INDEX
    if not path.is_file():
        return None
    try:
        found = dict(json.loads(path.read_text())["weight_map"])
        plain = bool(found) and all(Path(file).name == file for file in found.values())
    except (ValueError, KeyError, TypeError):
        plain = False
    if not plain:
        raise ValueError(
            f"{path}: not an index of tensors (weight_map: tensor -> a file of this directory); copy it again"
        )
    return found


def model_files(directory: Path) -> list[Path]:
    """The files that make up a model: weights, config, tokenizer and generation settings."""
    wanted = [*weight_files(directory), *(directory / name for name in (INDEX, "config.json", *COMPANIONS))]
    return [path for path in wanted if path.is_file()]


def fingerprint(directory: Path) -> dict[str, str]:
    """SHA-256 of each of its files, by name; read again only when a file has changed (durable.file_hashes)."""
    files = model_files(directory)
    return dict(zip((path.name for path in files), file_hashes(files), strict=True))


def copy_companions(source: Path, out: Path) -> None:
    """The tokenizer, and how the model likes to generate."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def check_new(out: Path) -> None:
    """Raises ValueError: there is something at `out` already, and not just an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} exists already and is not an empty directory; name one that is, or a new one")


def check_room(directory: Path, needed_bytes: int = 0) -> None:
    """Raises ValueError: `directory`, which need not exist yet, cannot be written to or lacks the room."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if os.access(path, os.F_OK))
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        read_only = os.statvfs(there).f_flag & os.ST_RDONLY
        reason = "its file system is read-only" if read_only else f"no permission to write in {there}"
        raise ValueError(f"{directory}: cannot write there, {reason}; choose another directory")
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise ValueError(
            f"{directory}: {needed_bytes:,} bytes are to be written, but only {free:,} are free there; free some space or "
            "choose another disk"
        )
