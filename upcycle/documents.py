"""Documents of a domain, wherever they come from, and a fingerprint that says which documents they are."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upcycle.config import DomainConfig
from upcycle.corpora import CORPORA, corpus_fingerprint, within
from upcycle.durable import file_hashes

SUFFIXES = {
    "json": (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst"),
    "parquet": (".parquet",),
    "text": (".txt", ".txt.gz"),
}


def read_documents(domain: DomainConfig, rng_seed: int = 1) -> Iterator[str]:
    """Texts of a domain in the source's order, as many whole documents as fit in `max_bytes`; some may be empty.

    A document is a row of `text_column`. Of `text` sources it is a file, or, if there is only one file, a paragraph
    (text between blank lines). Raises ValueError for a missing path or column, and for a domain without documents.
    """
    check_settings(domain)
    if domain.source == "corpus":
        corpus_fingerprint(domain.path, domain.max_bytes)  # raises for unknown names and packages
        texts = CORPORA[domain.path](domain.max_bytes, rng_seed)
    else:
        texts = within(readable_texts(domain), domain.max_bytes)
    first = next(texts, None)
    if first is None:
        raise ValueError(
            f"domain {domain.path} (source={domain.source}, split={domain.split}) has no document within max_bytes="
            f"{domain.max_bytes}; check path and split, or raise max_bytes"
        )
    yield first
    yield from texts


def readable_texts(domain: DomainConfig) -> Iterator[str]:
    """Texts of a file or hub source; raises ValueError where the files are not what `source` says."""
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    try:
        yield from column_texts(domain, load(domain))
    except (DatasetsError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(
            f"domain {domain.path} could not be read as source={domain.source}: {error}; expected non-empty UTF-8 "
            f"{domain.source} files, so check source and path"
        ) from error


def check_settings(domain: DomainConfig) -> None:
    """Raises ValueError for settings that this source would ignore."""
    hub_only = [name for name in ("subset", "revision") if getattr(domain, name) is not None]
    if domain.source != "hub" and hub_only:
        raise ValueError(
            f"{hub_only[0]} is for source=hub, but domain {domain.path} has source={domain.source}; drop it"
        )
    if domain.streaming and domain.num_proc:
        raise ValueError(
            f"domain {domain.path}: num_proc={domain.num_proc} cannot speed up streaming; drop one of them"
        )


def load(domain: DomainConfig) -> Any:
    """The `datasets` object of a domain: a Dataset, or an IterableDataset if it is streamed."""
    from datasets import load_dataset

    how: dict[str, Any] = {"split": domain.split, "streaming": domain.streaming, "num_proc": domain.num_proc}
    if domain.source == "hub":
        try:
            return load_dataset(domain.path, domain.subset, revision=domain.revision, **how)
        except (OSError, ValueError) as error:  # not found, no network, no such subset or split
            raise ValueError(
                f"the dataset {domain.path!r} (subset={domain.subset}, split={domain.split}, revision="
                f"{domain.revision}) could not be read: {error}; check the name, or download it and give its folder"
            ) from error
    files = [str(path) for path in local_files(domain)]
    if domain.source == "text":
        how["sample_by"] = "document" if len(files) > 1 else "paragraph"
    return load_dataset(domain.source, data_files={domain.split.split("[")[0]: files}, **how)


def local_files(domain: DomainConfig) -> list[Path]:
    """The files that a local domain's path (a file, a glob, or a folder with everything below it) names, sorted."""
    path = Path(domain.path).expanduser()
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
    files = sorted(file for file in found if file.is_file())
    if path.is_dir():
        files = [file for file in files if domain.source == "hub" or file.name.endswith(SUFFIXES[domain.source])]
    if not files:
        kinds = ", ".join(SUFFIXES.get(domain.source, ("*",)))
        raise ValueError(
            f"path={domain.path!r} names no {domain.source} file (looked for {kinds} in {path.absolute()}); "
            "give a file, a glob in quotes, or a folder"
        )
    return files


def column_texts(domain: DomainConfig, dataset: Any) -> Iterator[str]:
    """The text column of a `datasets` object, read in batches."""
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if columns and domain.text_column not in columns:
        raise ValueError(
            f"text_column={domain.text_column!r} is not in {domain.path}; its columns are {', '.join(columns)}"
        )
    if not columns:
        return
    for batch in dataset.select_columns(domain.text_column).iter(1000):
        for text in batch[domain.text_column]:
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"text_column={domain.text_column!r} of {domain.path} holds {type(text).__name__}, not text; "
                    "name a column of strings"
                )
            yield text or ""


def fingerprint(domain: DomainConfig, cache: Path | None = None) -> dict[str, Any]:
    """What a domain's documents are, for cache keys: corpora by package versions, files by hash, hub by revision.

    A hub name without a revision is taken at its word: give `revision` to notice that the dataset changed.
    """
    if domain.source == "corpus":
        return corpus_fingerprint(domain.path, domain.max_bytes)
    identity = {
        "source": domain.source,
        "subset": domain.subset,
        "split": domain.split,
        "text_column": domain.text_column,
        "max_bytes": domain.max_bytes,
    }
    if domain.source == "hub" and not Path(domain.path).expanduser().exists():
        return identity | {"path": domain.path, "revision": domain.revision}
    files = local_files(domain)
    hashes = file_hashes(files, cache)
    return identity | {"files": len(files), "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest()}
