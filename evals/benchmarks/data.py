"""Tokenising and packing, against the tokenizer alone."""

from __future__ import annotations

import hashlib
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evals.benchmarks.rows import Row, compared, unscored
from evals.benchmarks.sides import Bench, SideFailed, alternate

TEXT_BYTES = {False: 16_000_000, True: 200_000}
VOCABULARY = {False: 8192, True: 400}
NAME, UNIT = "tokenize", "bytes/s"


def write_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The standard library's sources as train.parquet below `folder`, one document a file, and a tokenizer of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from upcycle.config import TokenizerConfig
    from upcycle.data import fit_tokenizer

    folder, texts, size = Path(config["folder"]), [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if size >= config["bytes"]:
            break
        if "site-packages" not in path.parts and (text := path.read_text(errors="replace")).strip():
            texts.append(text)
            size += len(text.encode())
    pq.write_table(pa.table({"text": texts}), folder / "train.parquet")
    vocabulary = TokenizerConfig(vocab_size=config["vocabulary"], proportions={"code": 1.0}, sample_bytes=2_000_000)
    fit_tokenizer(vocabulary, {"code": folder}, folder / "tokenizer")
    return {"bytes": size, "documents": len(texts)}


class OursSide:
    """Text to token arrays on disk. config: `folder`."""

    def __init__(self, config: Mapping[str, Any]):
        import datasets
        from transformers import AutoTokenizer

        datasets.disable_progress_bars()
        self.folder, self.about = Path(config["folder"]), {}
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    def measure(self) -> dict[str, Any]:
        import numpy as np

        from upcycle.data import tokenize_split

        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            start = time.perf_counter()
            tokenize_split(self.folder / "train.parquet", self.tokenizer, Path(out), np.uint16, None)
            seconds = time.perf_counter() - start
            tokens = np.load(Path(out) / "train.tokens.npy")
        return {"seconds": seconds, "tokens": len(tokens), "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}


class PeerSide:
    """The same texts, in memory, through `encode_batch` of tokenizers, and nothing else. config: `folder`."""

    def __init__(self, config: Mapping[str, Any]):
        import pyarrow.parquet as pq
        from tokenizers import Tokenizer

        folder = Path(config["folder"])
        self.texts, self.about = pq.read_table(folder / "train.parquet")["text"].to_pylist(), {}
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

    def measure(self) -> dict[str, Any]:
        import numpy as np

        from upcycle.data import EOS

        start = time.perf_counter()
        encoded = self.tokenizer.encode_batch(self.texts, add_special_tokens=False)
        seconds = time.perf_counter() - start
        end = self.tokenizer.token_to_id(EOS)
        tokens = np.concatenate([np.array([*one.ids, end], dtype=np.uint16) for one in encoded])
        return {"seconds": seconds, "tokens": len(tokens), "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}


def tokenize(bench: Bench) -> Iterator[Row]:
    """Bytes of text a second."""
    folder = bench.folder / "text"
    folder.mkdir()
    sizes = {"bytes": TEXT_BYTES[bench.quick], "vocabulary": VOCABULARY[bench.quick]}
    try:
        written = bench.once("data:write_text", {"folder": str(folder)} | sizes)
        case = f"{written['documents']} files, {written['bytes'] / 1e6:.1f} MB"
        sides = {one: bench.side(f"data:{one}", {"folder": str(folder)}) for one in ("OursSide", "PeerSide")}
        found = alternate(sides, bench.rounds + 1)  # the first is not counted: imports and caches
        ours, peer = found.pair("OursSide", "PeerSide", "sha256")
        if ours != peer:
            counts = found.pair("OursSide", "PeerSide", "tokens")
            raise SideFailed(f"ours made {counts[0][0]:,} tokens, encode_batch {counts[1][0]:,}, not the same ones")
        rates = [[written["bytes"] / one for one in found.of(side, "seconds")[1:]] for side in sides]
        yield compared(
            NAME, case, rates[0], rates[1], UNIT, checked="same tokens", note="ours also reads Parquet and writes the arrays"
        )  # fmt: skip
    except SideFailed as error:
        yield unscored(NAME, "standard library", UNIT, str(error))


BENCHMARKS: dict[str, Callable[[Bench], Iterator[Row]]] = {"tokenize": tokenize}
