"""From a domain's description to token arrays on disk: documents -> splits -> tokenizer -> tokens.

Documents that are nearly alike share a split, and the split is chosen by a hash of their text: a test split is fixed
before anything is trained. Batches of the arrays are made in `batches.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.batches import mixed
from upcycle.config import DataConfig, DomainConfig, TokenizerConfig
from upcycle.documents import read_documents
from upcycle.store import ignore

SPLITS = ("train", "valid", "test")
EOS = "<|endoftext|>"
PERMUTATIONS = 128  # MinHash: the standard error of an estimated similarity of 0.7 is 0.04
SHINGLE_WORDS = 5
CHUNK_TOKENS = 2_000_000
CHUNK_DOCUMENTS, CHUNKS = 1000, 50  # tokenised at once: at least so many, and a split in at most so many pieces


def near_duplicate_clusters(
    texts: Sequence[str], similarity: float, rng_seed: int, advance: Callable[..., None] = ignore
) -> np.ndarray:
    """Cluster number of each document; two documents share one if a chain of near duplicates connects them.

    Near duplicates have an estimated Jaccard similarity >= `similarity` of their sets of 5-word shingles (MinHash,
    Broder 1997; candidates by banding). Exact duplicates are linked first, so thousands of copies cost nothing.
    """
    from datasketch import MinHash, MinHashLSH
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[bytes, int] = {}
    links: list[tuple[int, int]] = []
    signatures: dict[int, MinHash] = {}
    # A lower threshold in the index catches pairs that banding would miss; the estimate decides afterwards.
    index: Any = MinHashLSH(threshold=0.8 * similarity, num_perm=PERMUTATIONS)
    empty = MinHash(num_perm=PERMUTATIONS, seed=rng_seed, hashfunc=int)
    word_hashes: dict[str, int] = {}
    for number, text in enumerate(texts):
        advance(number + 1, len(texts), doing="documents compared")
        original = first.setdefault(text_hash(text), number)
        if original != number:
            links.append((original, number))
            continue
        signature = empty.copy()
        signature.update_batch(shingle_hashes(text, word_hashes).tolist())
        links += [
            (other, number) for other in index.query(signature) if signatures[other].jaccard(signature) >= similarity
        ]
        index.insert(number, signature)
        signatures[number] = signature
    rows, columns = np.array(links, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(links), dtype=bool), (rows, columns)), shape=(len(texts), len(texts)))
    return connected_components(graph, directed=False)[1]


def shingle_hashes(text: str, word_hashes: dict[str, int]) -> np.ndarray:
    """Distinct 32-bit hashes of the runs of 5 words (of all words, if there are fewer). Fills `word_hashes`."""
    words = text.lower().split()
    for word in set(words) - word_hashes.keys():
        word_hashes[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    hashes = np.array([word_hashes[word] for word in words], dtype=np.uint64)
    return np.unique(window_hashes(hashes, min(SHINGLE_WORDS, len(words))) >> np.uint64(32))  # datasketch wants 32 bits


def window_hashes(values: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of every run of `length` consecutive uint64 values."""
    values, hashes = mixed(values), np.zeros(max(0, len(values) - length + 1), dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + len(hashes)]
    return mixed(hashes)


def text_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split_clusters(texts: Sequence[str], clusters: np.ndarray, domain: DomainConfig) -> dict[str, list[int]]:
    """Document numbers of each split.

    Clusters are ordered by a hash of their smallest document hash, whatever the order of the documents, and fill test,
    then valid, up to their share of the bytes; the rest trains. A cluster larger than a split's share passes it by.
    Raises ValueError if a split with a share would stay empty.
    """
    members: dict[int, list[int]] = {}
    for number, cluster in enumerate(clusters.tolist()):
        members.setdefault(cluster, []).append(number)
    sizes = [len(text.encode()) for text in texts]
    hashes = [text_hash(text) for text in texts]
    # Hashed again: the smallest of many hashes is small, so large clusters would all come first.
    ordered = sorted(members.values(), key=lambda docs: hashlib.sha256(min(hashes[n] for n in docs)).digest())
    room = {"test": domain.test_fraction * sum(sizes), "valid": domain.valid_fraction * sum(sizes), "train": np.inf}
    filled = dict.fromkeys(room, 0)
    splits: dict[str, list[int]] = {split: [] for split in SPLITS}
    for docs in ordered:
        cluster_bytes = sum(sizes[n] for n in docs)
        split = next(s for s in room if filled[s] < room[s] and cluster_bytes <= room[s])
        filled[split] += cluster_bytes
        splits[split] += docs
    wanted = [s for s in SPLITS if room[s] > 0 and not splits[s] and (s != "train" or domain.trained)]
    if wanted:
        raise ValueError(
            f"domain {domain.path} is too small: {len(texts)} documents in {len(ordered)} clusters of near duplicates "
            f"({sum(sizes):,} bytes) leave the split {wanted[0]} empty; add documents, or change test_fraction="
            f"{domain.test_fraction} and valid_fraction={domain.valid_fraction}"
        )
    return {split: sorted(docs) for split, docs in splits.items()}


def collect_domain(
    domain: DomainConfig, data: DataConfig, out: Path, advance: Callable[..., None] = ignore
) -> dict[str, Any]:
    """Read a domain and write `<split>.parquet` (column text) and `documents.json`, whose contents it returns.

    All documents are held in memory while they are compared; `max_bytes` bounds them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = list(_counted(read_documents(domain, data.rng_seed), domain.max_bytes, advance))
    texts = [text for text in documents if text.strip()]
    if not texts:
        raise ValueError(f"domain {domain.path} has {len(documents)} documents and all are empty; check text_column")
    clusters = near_duplicate_clusters(texts, data.near_duplicate_similarity, data.rng_seed, advance)
    splits = split_clusters(texts, clusters, domain)
    out.mkdir(parents=True, exist_ok=True)
    stats: dict[str, Any] = {"empty_documents": len(documents) - len(texts), "splits": {}}
    for split, numbers in splits.items():
        chosen = [texts[n] for n in numbers]
        pq.write_table(pa.table({"text": pa.array(chosen, pa.large_string())}), out / f"{split}.parquet")
        distinct = len({int(clusters[n]) for n in numbers})
        stats["splits"][split] = {
            "documents": len(numbers),
            "bytes": sum(len(text.encode()) for text in chosen),
            "clusters": distinct,
            "near_duplicates": len(numbers) - distinct,
        }
    (out / "documents.json").write_text(json.dumps(stats, indent=2) + "\n")
    return stats


def _counted(texts: Iterator[str], max_bytes: int | None, advance: Callable[..., None]) -> Iterator[str]:
    """The texts as they come; how many there will be is known only where `max_bytes` bounds them."""
    read_bytes = 0
    for number, text in enumerate(texts):
        yield text
        if max_bytes is not None:
            read_bytes += len(text.encode())
            advance(min(read_bytes, max_bytes), max_bytes, doing=f"bytes read, {number + 1} documents")


def sampled_texts(documents: Path, sample_bytes: float) -> Iterator[str]:
    """Whole training documents in the order of their hashes, until sample_bytes are reached."""
    import pyarrow.parquet as pq

    texts: list[str] = pq.read_table(documents / "train.parquet")["text"].to_pylist()
    taken_bytes = 0
    for text in sorted(texts, key=text_hash):
        if taken_bytes >= sample_bytes:
            return
        taken_bytes += len(text.encode())
        yield text


def fit_tokenizer(
    config: TokenizerConfig, documents: dict[str, Path], out: Path, advance: Callable[..., None] = ignore
) -> None:
    """Train a byte-level BPE on the domains' training documents and save it for AutoTokenizer.

    Differs from GPT-2's: every digit is a token of its own, which makes numbers learnable for a small model.
    `documents` maps domains to folders of `collect_domain`. Raises ValueError for a domain without one, and for text
    that does not support `vocab_size` tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    shares = {name: share for name, share in sorted(config.proportions.items()) if share > 0}
    for name in shares:
        if name not in documents:
            near = difflib.get_close_matches(name, documents, n=1) or sorted(documents)[:5]
            raise ValueError(f"tokenizer.proportions name {name!r}, which is no domain; nearest: {', '.join(near)}")
    total = sum(shares.values())
    texts = [
        text
        for name, share in shares.items()
        for text in sampled_texts(documents[name], config.sample_bytes * share / total)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[EOS], initial_alphabet=sorted(alphabet), show_progress=False
    )

    def counted() -> Iterator[str]:
        for number, text in enumerate(texts):
            advance(number + 1, len(texts), doing="documents; then their pairs are merged")
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={config.vocab_size}, but {sum(map(len, texts)):,} characters of text make a "
            f"vocabulary of {tokenizer.get_vocab_size()}; set that, or raise sample_bytes or max_bytes"
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    ).save_pretrained(out)


def encode(batch: dict[str, list[str]], tokenizer: Any) -> dict[str, list]:
    """Token ids of each text, ended by EOS; an EOS written out in a text is encoded as ordinary characters."""
    ids = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return {
        "tokens": [[*document, tokenizer.eos_token_id] for document in ids],
        "bytes": [len(text.encode()) for text in batch["text"]],
    }


def tokenize_domain(
    documents: Path, tokenizer: Path, out: Path, num_proc: int | None = None, advance: Callable[..., None] = ignore
) -> dict[str, Any]:
    """Write `<split>.{tokens,offsets,bytes}.npy` for each split, and `tokens.json`, whose contents it returns.

    tokens: uint16, or uint32 if the vocabulary needs it; offsets: int64, documents + 1; bytes: int64, UTF-8 bytes of
    each document. Raises ValueError for a tokenizer without an EOS token.
    """
    from transformers import AutoTokenizer

    encoder = AutoTokenizer.from_pretrained(tokenizer)
    if encoder.eos_token_id is None:
        raise ValueError(f"the tokenizer in {tokenizer} has no eos_token, which separates documents; set one in it")
    encoder.model_max_length = int(1e30)  # documents are cut into windows later: no warning that they are long
    out.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if len(encoder) <= 2**16 else np.uint32
    stats: dict[str, Any] = {"vocab_size": len(encoder), "dtype": np.dtype(dtype).name, "splits": {}}
    for split in SPLITS:
        parquet = documents / f"{split}.parquet"
        stats["splits"][split] = tokenize_split(parquet, encoder, out, dtype, num_proc, advance)
    (out / "tokens.json").write_text(json.dumps(stats, indent=2) + "\n")
    return stats


def tokenize_split(
    parquet: Path, encoder: Any, out: Path, dtype: type, num_proc: int | None, advance: Callable[..., None] = ignore
) -> dict[str, int]:
    """Write one split's three arrays into `out`, without ever holding its tokens in memory."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    split = parquet.stem
    if not pq.read_metadata(parquet).num_rows:  # datasets cannot read an empty file, numpy cannot map an empty array
        for part, array in (("tokens", np.empty(0, dtype)), ("offsets", np.zeros(1, int)), ("bytes", np.zeros(0, int))):
            np.save(out / f"{split}.{part}.npy", array)
        return {"documents": 0, "tokens": 0, "bytes": 0}
    columns = Features({"tokens": List(Value("int32")), "bytes": Value("int64")})
    with tempfile.TemporaryDirectory(dir=out) as cache:  # inside: a crash leaves it to `out`'s owner
        texts = Dataset.from_parquet(str(parquet), cache_dir=cache)
        size, pieces, lengths = max(CHUNK_DOCUMENTS, -(-len(texts) // CHUNKS)), [], []
        for start in range(0, len(texts), size):  # in pieces, for `map` says nothing until it has done
            piece: Any = texts.select(range(start, min(start + size, len(texts)))).map(
                encode, batched=True, remove_columns="text", fn_kwargs={"tokenizer": encoder}, num_proc=num_proc,
                features=columns, new_fingerprint=f"{split}-{start}",
            ).with_format("arrow")  # fmt: skip
            pieces.append(piece)
            lengths += [pc.call_function("list_value_length", [one["tokens"]]).to_numpy() for one in piece.iter(1000)]
            done, tokens = sum(map(len, lengths)), sum(int(one.sum()) for one in lengths)
            advance(done, len(texts), doing=f"documents of {split}, {tokens:,} tokens")
        encoded: Any = concatenate_datasets(pieces).with_format("arrow")
        offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
        target = np.lib.format.open_memmap(out / f"{split}.tokens.npy", "w+", dtype, (int(offsets[-1]),))
        written = 0
        for batch in encoded.iter(1000):
            tokens = batch["tokens"].combine_chunks().flatten().to_numpy()
            target[written : written + len(tokens)] = tokens
            written += len(tokens)
        target.flush()
        document_bytes = np.array(encoded.with_format("numpy")["bytes"][:], dtype=np.int64)
    np.save(out / f"{split}.offsets.npy", offsets)
    np.save(out / f"{split}.bytes.npy", document_bytes)
    return {"documents": len(document_bytes), "tokens": int(offsets[-1]), "bytes": int(document_bytes.sum())}


def ngram_overlap(train_tokens: Path, test_tokens: Path, n: int, advance: Callable[..., None] = ignore) -> float:
    """Share of the test split's token n-grams (inside documents, before EOS) that occur in the train split.

    0.0 if every test document is shorter than n tokens. Memory: 16 bytes per test token and 100 MB.
    """
    test = np.load(test_tokens / "test.tokens.npy")
    offsets = np.load(test_tokens / "test.offsets.npy")
    starts = np.arange(max(0, len(test) - n + 1))
    ends = offsets[np.searchsorted(offsets, starts, side="right")] - 1  # where the EOS of each start's document is
    hashes = window_hashes(test.astype(np.uint64), n)[starts + n <= ends]
    if not len(hashes):
        return 0.0
    distinct, positions = np.unique(hashes, return_counts=True)
    train = np.load(train_tokens / "train.tokens.npy", mmap_mode="r")
    found = np.zeros(len(distinct), dtype=bool)
    for start in range(0, len(train), CHUNK_TOKENS):
        chunk = np.asarray(train[start : start + CHUNK_TOKENS + n - 1], dtype=np.uint64)
        found |= np.isin(distinct, window_hashes(chunk, n))
        advance(min(start + CHUNK_TOKENS, len(train)), len(train), doing="training tokens looked up")
    return float(positions[found].sum() / positions.sum())
