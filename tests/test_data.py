"""Documents -> splits -> tokenizer -> tokens: what goes in comes out, once, and the same everywhere."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from upcycle.config import DataConfig, DomainConfig, TokenizerConfig
from upcycle.corpora import CORPORA, corpus_fingerprint, plain
from upcycle.data import (
    EOS,
    collect_domain,
    fit_tokenizer,
    near_duplicate_clusters,
    ngram_overlap,
    split_clusters,
    tokenize_domain,
)
from upcycle.documents import fingerprint, read_documents
from upcycle.durable import file_hashes

TEXTS = [f"document {n} says " + " ".join(f"word{n * k % 97}" for k in range(40)) for n in range(120)]
WORDS = [f"{a}{b}" for a in ("ka", "mo", "ri", "tu", "sel", "bor") for b in ("len", "tis", "var", "dom", "qua")]


def prose(draw: random.Random, words: int = 60) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def write_json(path: Path, texts: list, column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "id": n}) + "\n" for n, text in enumerate(texts)))
    return path


def domain_of(path: Path, source: str = "json", **settings) -> DomainConfig:
    return DomainConfig(source=source, path=str(path), **settings)


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> dict[str, Path]:
    """Two small collected domains, `words` and `numbers`."""
    root = tmp_path_factory.mktemp("collected")
    draw = random.Random(1)
    texts = {
        "words": [prose(draw) for _ in range(150)],
        "numbers": [" ".join(str(draw.randint(0, 10**6)) for _ in range(40)) for _ in range(150)],
    }
    for name, documents in texts.items():
        source = domain_of(write_json(root / f"{name}.jsonl", documents), test_fraction=0.1, valid_fraction=0.1)
        collect_domain(source, DataConfig(), root / name)
    return {name: root / name for name in texts}


@pytest.fixture(scope="module")
def tokenizer(collected, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    fit_tokenizer(TokenizerConfig(vocab_size=320, proportions={"words": 1, "numbers": 1}), collected, out)
    return out


# Corpora ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA)
def test_corpus_yields_whole_documents_up_to_max_bytes(name):
    texts = list(CORPORA[name](60_000, 1))
    assert texts and all(isinstance(text, str) for text in texts)
    assert sum(len(text.encode()) for text in texts) <= 60_000
    more = list(CORPORA[name](90_000, 1))
    assert more[: len(texts)] == texts and more != list(CORPORA[name](90_000, 2))


def test_corpora_are_the_same_in_another_process():
    script = (
        "import hashlib; from upcycle.corpora import CORPORA\n"
        "print(hashlib.sha256(repr([list(f(60_000, 1)) for f in CORPORA.values()]).encode()).hexdigest())"
    )
    expected = hashlib.sha256(repr([list(f(60_000, 1)) for f in CORPORA.values()]).encode()).hexdigest()
    found = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": "5"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == expected


def test_math_problems_leave_the_callers_random_state_alone():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    list(CORPORA["math_problems"](5_000, 1))
    assert random.random() == expected


def test_latex_becomes_plain_text():
    assert plain(r"$\frac{-8 + \sqrt{48}}{2*1}$") == "(-8 + sqrt(48))/(2*1)"
    assert plain(r"$80^{\frac{1}{6}} \cdot x^{2}$") == "80^{1/6} * x^2"
    assert plain(r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}") == "[1, 2; 3, 4]"


def test_math_programs_run_and_print_what_they_say():
    for document in CORPORA["math_programs"](30_000, 4):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(document, {})  # its asserts check the answers that are not in comments
        stated = [
            line.split("  # ")[1] for line in document.splitlines() if line.startswith("print(") and "  # " in line
        ]
        assert len(printed.getvalue().splitlines()) == 6
        assert set(stated) <= set(printed.getvalue().splitlines())


def test_fingerprint_of_a_corpus_imports_nothing_heavy():
    script = (
        "import sys; from upcycle.corpora import CORPORA, corpus_fingerprint, plain\n"
        "print([corpus_fingerprint(name, 10) for name in CORPORA])\n"
        "assert not {'torch', 'datasets', 'mathgenerator', 'numpy'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_unknown_corpus_and_missing_package_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="choose one of python_stdlib"):
        corpus_fingerprint("novels", None)
    monkeypatch.setitem(__import__("upcycle.corpora").corpora.DISTRIBUTIONS, "licenses", ("no-such-package-here",))
    with pytest.raises(ValueError, match=r"pip install \"upcycle\[demo\]\""):
        corpus_fingerprint("licenses", None)


# Sources ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"streaming": True}, {"num_proc": 2}])
@pytest.mark.parametrize("source", ["json", "parquet", "text", "hub"])
def test_every_source_gives_the_same_documents(tmp_path, source, how):
    half = len(TEXTS) // 2
    if source == "text":
        for n, text in enumerate(TEXTS):
            (tmp_path / f"{n:03}.txt").write_text(text)
    elif source == "parquet":
        for n, part in enumerate((TEXTS[:half], TEXTS[half:])):
            pq.write_table(pa.table({"text": part}), tmp_path / f"{n}.parquet")
    else:  # a folder of JSON files, and the same read as the Hub would lay it out
        folder = tmp_path / "data" if source == "hub" else tmp_path
        folder.mkdir(exist_ok=True)
        for n, part in enumerate((TEXTS[:half], TEXTS[half:])):
            write_json(folder / f"train-{n:05}-of-00002.jsonl", part)
    assert list(read_documents(domain_of(tmp_path, source, **how))) == TEXTS


def test_a_single_text_file_is_read_by_paragraphs(tmp_path):
    (tmp_path / "book.txt").write_text("one\nstill one\n\ntwo\n\nthree\n")
    texts = list(read_documents(domain_of(tmp_path / "book.txt", "text")))
    assert [text.strip() for text in texts] == ["one\nstill one", "two", "three"]


def test_globs_subsets_and_split_slices_are_honoured(tmp_path):
    write_json(tmp_path / "a.jsonl", TEXTS[:10])
    write_json(tmp_path / "b.jsonl", TEXTS[10:20])
    assert list(read_documents(domain_of(tmp_path / "b*.jsonl"))) == TEXTS[10:20]
    assert list(read_documents(domain_of(tmp_path / "a.jsonl", split="train[:50%]"))) == TEXTS[:5]
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files: a.jsonl\n- config_name: second\n  data_files: b.jsonl\n---\n"
    )
    assert list(read_documents(domain_of(tmp_path, "hub", subset="second"))) == TEXTS[10:20]


@pytest.mark.parametrize("streaming", [False, True])
def test_max_bytes_keeps_whole_documents(tmp_path, streaming):
    path = write_json(tmp_path / "a.jsonl", ["aaaa", "éé", "cccc"])
    assert list(read_documents(domain_of(path, max_bytes=9, streaming=streaming))) == ["aaaa", "éé"]


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_text_column_names_the_columns(tmp_path, streaming):
    path = write_json(tmp_path / "a.jsonl", TEXTS[:3], column="content")
    with pytest.raises(ValueError, match=r"text_column='text' is not in .*its columns are content, id"):
        list(read_documents(domain_of(path, streaming=streaming)))
    with pytest.raises(ValueError, match="holds int, not text"):
        list(read_documents(domain_of(path, text_column="id", streaming=streaming)))


def test_paths_and_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names no json file"):
        list(read_documents(domain_of(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match="could not be read"):
        list(read_documents(DomainConfig(source="hub", path="nobody/no-such-dataset")))
    path = write_json(tmp_path / "a.jsonl", TEXTS[:3])
    with pytest.raises(ValueError, match="subset is for source=hub"):
        list(read_documents(domain_of(path, subset="en")))
    with pytest.raises(ValueError, match="cannot speed up streaming"):
        list(read_documents(domain_of(path, streaming=True, num_proc=2)))
    with pytest.raises(ValueError, match="no document within max_bytes=3"):
        list(read_documents(domain_of(path, max_bytes=3)))


def test_fingerprint_follows_content_not_names_or_times(tmp_path):
    cache = tmp_path / "cache" / "hashes.json"
    path = write_json(tmp_path / "a.jsonl", TEXTS[:3])
    first = fingerprint(domain_of(path), cache)
    os.utime(path, (1, 1))
    assert fingerprint(domain_of(path), cache) == first
    moved = path.rename(tmp_path / "b.jsonl")
    assert fingerprint(domain_of(moved), cache) == first
    write_json(moved, TEXTS[:4])
    assert fingerprint(domain_of(moved), cache) != first
    hub = DomainConfig(source="hub", path="allenai/c4", subset="en", revision="abc")
    assert fingerprint(hub, cache)["revision"] == "abc"


def test_fingerprint_reads_an_unchanged_file_once(tmp_path, monkeypatch):
    cache = tmp_path / "hashes.json"
    path = write_json(tmp_path / "a.jsonl", TEXTS[:3])
    first = fingerprint(domain_of(path), cache)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert fingerprint(domain_of(path), cache) == first


@pytest.mark.parametrize("damage", [b"", b'{"a": [1, 2', b"\xff\xfe", b"null", b"[]"])
def test_a_damaged_hash_cache_is_an_empty_one(tmp_path, damage):
    cache, path = tmp_path / "hashes.json", write_json(tmp_path / "a.jsonl", TEXTS[:3])
    cache.write_bytes(damage)
    expected = [hashlib.sha256(path.read_bytes()).hexdigest()]
    assert file_hashes([path], cache) == expected
    assert json.loads(cache.read_text())[str(path)][3] == expected[0]
    cache.write_text(json.dumps({str(path): "not an entry"}))
    assert file_hashes([path], cache) == expected


def test_hashes_are_right_where_no_cache_can_be_kept(tmp_path):
    path = write_json(tmp_path / "a.jsonl", TEXTS[:3])
    expected = [hashlib.sha256(path.read_bytes()).hexdigest()]
    assert file_hashes([path], path / "below a file" / "hashes.json") == expected
    (tmp_path / "hashes.json").mkdir()
    assert file_hashes([path], tmp_path / "hashes.json") == expected


def test_a_rewritten_file_is_hashed_again_and_the_others_are_remembered(tmp_path, monkeypatch):
    cache = tmp_path / "hashes.json"
    first, second = (write_json(tmp_path / name, TEXTS[:3]) for name in ("a.jsonl", "b.jsonl"))
    before = file_hashes([first, second], cache)
    write_json(first, TEXTS[:4])
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, name: read.append(stream.name) or digest(stream, name))
    assert file_hashes([second, first], cache) == [before[1], hashlib.sha256(first.read_bytes()).hexdigest()]
    assert read == [str(first)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "hashes.json"]


def test_file_hashes_import_nothing_heavy():
    script = (
        "import sys; from upcycle.durable import file_hashes; file_hashes([])\n"
        "assert not {'torch', 'datasets', 'numpy'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


# Splits -------------------------------------------------------------------------------------------------------------


def near_copies(draw: random.Random) -> list[str]:
    """40 originals, each with a copy that differs in one word and an exact copy."""
    originals = [prose(draw).split() for _ in range(40)]
    changed = [[*words[:30], "changed", *words[31:]] for words in originals]
    return [" ".join(words) for words in originals + changed + originals]


def splits_of(texts: list[str], domain: DomainConfig) -> dict[str, list[int]]:
    """The splits as collect_domain makes them, before they are written."""
    data = DataConfig()
    return split_clusters(texts, near_duplicate_clusters(texts, data.near_duplicate_similarity, data.rng_seed), domain)


def test_near_duplicates_are_found_and_others_kept_apart():
    texts = near_copies(random.Random(2))
    clusters = near_duplicate_clusters(texts, 0.7, rng_seed=1)
    np.testing.assert_array_equal(clusters[:40], clusters[40:80])
    np.testing.assert_array_equal(clusters[:40], clusters[80:])
    assert len(set(clusters.tolist())) == 40


def test_near_duplicates_share_a_split_whatever_the_order():
    texts = near_copies(random.Random(3))
    domain = DomainConfig(source="json", path="x", test_fraction=0.2, valid_fraction=0.1)
    splits = splits_of(texts, domain)
    assert sorted(n for numbers in splits.values() for n in numbers) == list(range(120))
    home = {texts[n]: split for split, numbers in splits.items() for n in numbers}
    for n in range(40):
        assert home[texts[n]] == home[texts[n + 40]]
    order = random.Random(4).sample(range(120), 120)
    again = splits_of([texts[n] for n in order], domain)
    assert {texts[order[n]]: split for split, numbers in again.items() for n in numbers} == home


def test_splits_have_their_share_of_the_bytes():
    draw = random.Random(5)
    texts = [prose(draw, words=draw.randint(10, 90)) for _ in range(400)]
    domain = DomainConfig(source="json", path="x", test_fraction=0.2, valid_fraction=0.1)
    splits = splits_of(texts, domain)
    share = {split: sum(len(texts[n]) for n in numbers) / sum(map(len, texts)) for split, numbers in splits.items()}
    assert share == pytest.approx({"test": 0.2, "valid": 0.1, "train": 0.7}, abs=0.01)


def test_a_domain_too_small_for_its_splits_is_refused():
    texts = ["the same words again and again in one document"] * 30
    with pytest.raises(ValueError, match=r"too small: 30 documents in 1 clusters.*split valid empty"):
        splits_of(texts, DomainConfig(source="json", path="x"))
    kept = splits_of(texts, DomainConfig(source="json", path="x", test_fraction=0, valid_fraction=0))
    assert len(kept["train"]) == 30 and not kept["test"]


def test_collect_counts_what_it_writes(tmp_path):
    texts = ["", "  \n", *near_copies(random.Random(6))]
    domain = domain_of(write_json(tmp_path / "a.jsonl", texts), test_fraction=0.2, valid_fraction=0.1)
    stats = collect_domain(domain, DataConfig(), tmp_path / "out")
    assert stats == json.loads((tmp_path / "out" / "documents.json").read_text())
    assert stats["empty_documents"] == 2
    written = []
    for split, counts in stats["splits"].items():
        found = pq.read_table(tmp_path / "out" / f"{split}.parquet")["text"].to_pylist()
        assert counts["documents"] == len(found) and counts["bytes"] == sum(len(text.encode()) for text in found)
        assert counts["near_duplicates"] == counts["documents"] - counts["clusters"] == 2 * counts["clusters"]
        written += found
    assert sorted(written) == sorted(texts[2:])


# Tokens -------------------------------------------------------------------------------------------------------------


def test_tokenizer_has_the_size_and_the_special_tokens(tokenizer):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    assert len(loaded) == 320 and loaded.eos_token == loaded.bos_token == loaded.pad_token == EOS
    text = "Ünïcode 1234, tabs\tand\n\n  spaces 🙂"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded("1234")["input_ids"]) == 4


def test_tokenizer_is_deterministic(collected, tokenizer, tmp_path):
    fit_tokenizer(TokenizerConfig(vocab_size=320, proportions={"numbers": 2, "words": 2}), collected, tmp_path)
    for file in tokenizer.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_tokenizer_errors_name_the_fix(collected, tmp_path):
    with pytest.raises(ValueError, match="nearest: words"):
        fit_tokenizer(TokenizerConfig(vocab_size=320, proportions={"word": 1}), collected, tmp_path)
    with pytest.raises(ValueError, match="raise sample_bytes"):
        fit_tokenizer(TokenizerConfig(vocab_size=60_000, proportions={"words": 1}), collected, tmp_path)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_tokens_decode_to_the_documents(collected, tokenizer, tmp_path, num_proc):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    stats = tokenize_domain(collected["words"], tokenizer, tmp_path / "tokens", num_proc)
    assert stats == json.loads((tmp_path / "tokens" / "tokens.json").read_text()) and stats["dtype"] == "uint16"
    for split, counts in stats["splits"].items():
        texts = pq.read_table(collected["words"] / f"{split}.parquet")["text"].to_pylist()
        tokens = np.load(tmp_path / "tokens" / f"{split}.tokens.npy", mmap_mode="r")
        offsets = np.load(tmp_path / "tokens" / f"{split}.offsets.npy")
        lengths = np.load(tmp_path / "tokens" / f"{split}.bytes.npy")
        assert tokens.dtype == np.uint16 and offsets.dtype == lengths.dtype == np.int64
        assert lengths.tolist() == [len(text.encode()) for text in texts]
        assert offsets[0] == 0 and offsets[-1] == len(tokens) == counts["tokens"]
        for text, start, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
            assert tokens[end - 1] == loaded.eos_token_id
            assert loaded.decode(tokens[start : end - 1].tolist()) == text
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]  # no cache is left behind


def test_long_texts_empty_splits_and_a_written_eos_are_fine(tokenizer, tmp_path):
    long = f"one {EOS} two " + "three " * 50_000
    for split, texts in {"train": [long], "valid": [], "test": ["é"]}.items():
        pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), tmp_path / f"{split}.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = tokenize_domain(tmp_path, tokenizer, tmp_path / "tokens")["splits"]
    tokens = np.load(tmp_path / "tokens" / "train.tokens.npy")
    assert (tokens == 0).sum() == 1 and tokens[-1] == 0  # EOS is token 0 here
    assert stats["valid"] == {"documents": 0, "tokens": 0, "bytes": 0} and stats["test"]["bytes"] == 2


@pytest.mark.parametrize("n", [1, 3, 13])
def test_ngram_overlap_equals_the_sets(tmp_path, n, monkeypatch):
    monkeypatch.setattr("upcycle.data.CHUNK_TOKENS", 50)  # n-grams across chunks count too
    draw = np.random.default_rng(n)
    shared = draw.integers(1, 6, 40)
    documents = {
        "train": [np.concatenate([draw.integers(1, 6, draw.integers(0, 30)), shared]) for _ in range(9)],
        "test": [draw.integers(1, 9, draw.integers(0, 40)) for _ in range(9)] + [shared],
    }
    grams: dict[str, list[tuple]] = {}
    for split, texts in documents.items():
        np.save(tmp_path / f"{split}.tokens.npy", np.concatenate([[*text, 0] for text in texts]).astype(np.uint16))
        np.save(tmp_path / f"{split}.offsets.npy", np.cumsum([0] + [len(text) + 1 for text in texts]))
        grams[split] = [tuple(text[i : i + n].tolist()) for text in texts for i in range(len(text) - n + 1)]
    known = set(grams["train"])
    expected = sum(gram in known for gram in grams["test"]) / len(grams["test"])
    assert 0 < expected <= 1
    assert ngram_overlap(tmp_path, tmp_path, n) == pytest.approx(expected)


def test_uint32_where_the_vocabulary_needs_it(collected, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({EOS: 0, **{str(n): n for n in range(1, 2**16 + 1)}}, unk_token=EOS))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS).save_pretrained(tmp_path / "large")
    assert tokenize_domain(collected["words"], tmp_path / "large", tmp_path / "tokens")["dtype"] == "uint32"
    assert np.load(tmp_path / "tokens" / "test.tokens.npy").dtype == np.uint32


def test_a_tokenizer_without_eos_is_refused(collected, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no eos_token"):
        tokenize_domain(collected["words"], tmp_path / "bare", tmp_path / "tokens")


def test_first_documents_of_a_large_corpus_come_without_reading_it_all():
    assert len(list(islice(CORPORA["math_problems"](None, 1), 3))) == 3
