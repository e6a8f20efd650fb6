"""Batches are a pure function of (proportions, rng_seed, step)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from upcycle.batches import BLOCK, Batches, TokenArray, consumed_tokens, permuted, random_words, slot_counts

S, B = 8, 6
THIRDS = {"code": 1.0, "law": 2.0, "math": 3.0}


def write_tokens(directory: Path, tokens: np.ndarray, split: str = "train") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / f"{split}.tokens.npy", tokens)
    np.save(directory / f"{split}.offsets.npy", np.array([0, len(tokens)]))
    np.save(directory / f"{split}.bytes.npy", np.array([4 * len(tokens)]))
    return directory


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    """Domains whose tokens say where they are: token t of domain number d is 10,000·d + t. Sizes aren't multiples of S."""
    sizes = {"code": 8003, "law": 4001, "math": 9007}
    return {
        name: write_tokens(tmp_path / name, (10_000 * number + np.arange(size)).astype(np.uint16))
        for number, (name, size) in enumerate(sizes.items())
    }


def windows_of(batches: Batches, domain: int, steps: range) -> list[int]:
    """First tokens of the windows that the steps take of a domain, in order."""
    firsts = np.concatenate([batches.batch(step)[:, 0] for step in steps])
    return [int(first) % 10_000 // S for first in firsts if first // 10_000 == domain]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4096, 4097, 10_007])
def test_feistel_network_is_a_permutation(size):
    for epoch in range(3):
        images = permuted(np.arange(size), size, random_words(7, epoch, 6))
        assert sorted(images.tolist()) == list(range(size))


def test_permutations_of_two_epochs_and_of_two_domains_differ():
    drawn = [permuted(np.arange(1000), 1000, random_words(key, epoch, 6)) for key in (1, 2) for epoch in (0, 1)]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert (first == second).sum() < 10  # two random permutations agree in 1 place on average


def test_windows_are_whole_and_each_comes_once_an_epoch(directories):
    batches = Batches(directories, {"law": 1.0}, S, B, rng_seed=3)
    windows = 4001 // S
    steps = range(-(-2 * windows // B))
    for step in steps:
        batch = batches.batch(step)
        assert batch.dtype == np.int64 and batch.shape == (B, S)
        np.testing.assert_array_equal(batch, batch[:, :1] + np.arange(S))
    seen = windows_of(batches, 1, steps)
    assert sorted(seen[:windows]) == sorted(seen[windows : 2 * windows]) == list(range(windows))
    assert seen[:windows] != seen[windows : 2 * windows]


def test_every_block_has_exactly_the_stated_proportions():
    counts = slot_counts({"a": 0.5, "b": 0.3, "c": 0.2, "none": 0.0})
    assert counts == {"a": 5000, "b": 3000, "c": 2000, "none": 0}
    assert sum(slot_counts(dict.fromkeys("abcdefg", 1.0)).values()) == BLOCK
    for rng_seed in (1, 2):
        taken = consumed_tokens(THIRDS, rng_seed, S, 3 * BLOCK)
        assert taken == {name: S * 3 * count for name, count in slot_counts(THIRDS).items()}


def test_every_batch_has_nearly_the_stated_proportions(directories):
    batches = Batches(directories, THIRDS, S, 60, rng_seed=1)
    for step in (0, 1, 17, 166, 167):  # the last two reach over the end of a block
        found = np.bincount(batches.batch(step)[:, 0] // 10_000, minlength=3)
        assert np.abs(found - [10, 20, 30]).max() <= 2


def test_consumed_tokens_counts_what_batches_take(directories):
    batches = Batches(directories, THIRDS, S, B, rng_seed=5)
    steps = 40
    counted = {name: S * len(windows_of(batches, i, range(steps))) for i, name in enumerate(THIRDS)}
    assert consumed_tokens(THIRDS, 5, S, steps * B) == counted


def test_skip_tokens_continues_where_a_branch_stopped(directories):
    """A mixture that skips what the branch took goes on in the same stream: together, no window twice."""
    branch = Batches(directories, {"code": 1.0}, S, B, rng_seed=9)
    first = windows_of(branch, 0, range(50))
    skip = consumed_tokens({"code": 1.0}, 9, S, 50 * B)
    mixture = Batches(directories, THIRDS, S, B, rng_seed=9, skip_tokens=skip)
    then = windows_of(mixture, 0, range(200))
    stream = windows_of(branch, 0, range(150))
    assert first + then == stream[: len(first) + len(then)]
    assert len(set(first + then)) == len(first) + len(then)


def test_a_step_does_not_depend_on_the_steps_before_it(directories):
    one, other = (Batches(directories, THIRDS, S, B, rng_seed=1) for _ in range(2))
    straight = [one.batch(step) for step in range(8)]
    for step in (5, 0, 7, 5):
        np.testing.assert_array_equal(other.batch(step), straight[step])
    assert not np.array_equal(Batches(directories, THIRDS, S, B, rng_seed=2).batch(0), straight[0])


def test_order_of_domains_does_not_matter(directories):
    turned = dict(reversed(THIRDS.items()))
    one, other = (Batches(directories, shares, S, B, rng_seed=1) for shares in (THIRDS, turned))
    np.testing.assert_array_equal(one.batch(3), other.batch(3))


def test_same_bytes_in_another_process(directories):
    script = (
        "import sys, hashlib; from pathlib import Path; from upcycle.batches import Batches\n"
        "root = Path(sys.argv[1]); names = ('code', 'law', 'math')\n"
        f"batches = Batches({{n: root / n for n in names}}, {THIRDS}, {S}, {B}, rng_seed=1)\n"
        "print(hashlib.sha256(b''.join(batches.batch(s).tobytes() for s in (0, 3, 2000))).hexdigest())\n"
    )
    batches = Batches(directories, THIRDS, S, B, rng_seed=1)
    expected = hashlib.sha256(b"".join(batches.batch(step).tobytes() for step in (0, 3, 2000))).hexdigest()
    for hash_seed in ("0", "1"):
        found = subprocess.run(
            [sys.executable, "-c", script, str(directories["code"].parent)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert found.stdout.strip() == expected


def test_stream_is_the_one_of_earlier_versions(directories):
    """Golden value: if this changes, stored experiments cannot be resumed or compared any more."""
    batch = Batches(directories, THIRDS, S, B, rng_seed=1).batch(0)
    assert batch[:, 0].tolist() == [12656, 21392, 27656, 12776, 6496, 25576]


def test_epochs_and_warnings_count_skipped_tokens(directories):
    batches = Batches(directories, {"law": 1.0}, S, B, 1, skip_tokens={"law": 500 * S}, max_epochs=1.5)
    windows = 4001 // S
    assert batches.epochs(10) == {"law": pytest.approx((500 + 60) / windows)}
    assert batches.check(10) == []
    assert "law" in batches.check(100)[0] and "max_epochs=1.5" in batches.check(100)[0]


def test_errors_name_the_nearest_domain_the_missing_file_and_the_short_split(directories, tmp_path):
    with pytest.raises(ValueError, match="did you mean code"):
        Batches(directories, {"coda": 1.0}, S, B, 1)
    with pytest.raises(ValueError, match=r"lacks test\.tokens\.npy"):
        TokenArray(directories["law"], "test")
    with pytest.raises(ValueError, match="fewer than one sequence of 5000"):
        Batches(directories, {"law": 1.0}, 5000, B, 1)
    with pytest.raises(ValueError, match="too small to be drawn"):
        slot_counts({"a": 1.0, "b": 1e-6})
    with pytest.raises(ValueError, match="at least one"):
        Batches(directories, {"law": 0.0}, S, B, 1)


def test_token_array_is_memory_mapped(directories):
    array = TokenArray(directories["law"])
    assert len(array) == 4001 and isinstance(array.tokens, np.memmap) and array.bytes.tolist() == [4 * 4001]


def test_empty_split_is_refused_with_a_reason(tmp_path):
    write_tokens(tmp_path, np.empty(0, np.uint16))
    with pytest.raises(ValueError, match="0 tokens"):
        TokenArray(tmp_path)
