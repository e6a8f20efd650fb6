"""Where TIES cuts, what reads a checkpoint's tensors, and how they are made side by side."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import save_file

from upcycle import trimming
from upcycle.ahead import in_order
from upcycle.tensor_file import TensorFile
from upcycle.trimming import Tau, cut


def draws(kind: str, entries: int) -> torch.Tensor:
    values = torch.randn(entries, generator=torch.Generator().manual_seed(entries))
    if kind == "rounded":  # many equal ones
        return (values * 4).round() / 4
    if kind == "half zeros":
        return values.masked_fill_(torch.arange(entries) % 2 == 0, 0.0)
    if kind == "sorted":
        return values.abs().sort().values
    return torch.full((entries,), -0.5) if kind == "constant" else values


@pytest.mark.parametrize("kind", ["normal", "rounded", "half zeros", "sorted", "constant"])
@pytest.mark.parametrize("sampled", [10, 2**15])
def test_a_cut_keeps_the_largest_and_of_equal_ones_the_first(kind, sampled, monkeypatch):
    """Against a stable sort; with a sample that says next to nothing too."""
    monkeypatch.setattr(trimming, "SAMPLED", sampled)
    monkeypatch.setattr(trimming, "BLOCK", 1000)
    for entries, density in ((5003, 0.2), (5003, 0.5), (4096, 0.501), (300, 0.01), (2, 0.5), (1, 0.3)):
        values = draws(kind, entries)
        tau = Tau(values, torch.zeros_like(values))
        keep = max(1, int(density * entries))
        expected = torch.zeros_like(values)
        first = values.abs().sort(descending=True, stable=True).indices[:keep]
        expected[first] = values[first]
        blocks = (tau.of(place) for place in trimming.places(entries, 1000))
        assert torch.equal(torch.cat(list(cut(tau, density).trimmed(blocks))), expected), (entries, density)


def test_what_is_no_number_ends_the_search_for_a_cut():
    values = torch.full((100,), float("nan"))
    assert torch.cat(list(cut(Tau(values, torch.zeros(100)), 0.5).trimmed([values]))).isnan().all()


def test_a_mapped_tensor_is_what_was_saved_and_writing_to_it_leaves_the_file_alone(tmp_path):
    kinds = (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
    saved = {f"t{n}": (torch.randn(n + 1, 5) * 9).to(kind) for n, kind in enumerate(kinds)}
    saved |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "small": torch.randn(3).to(torch.float8_e4m3fn)}
    save_file(saved, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.names == set(saved)
    for name, tensor in saved.items():
        found = file.get(name)
        assert (found.dtype, found.shape, file.shape(name)) == (tensor.dtype, tensor.shape, tuple(tensor.shape))
        assert torch.equal(found.float(), tensor.float())
    file.get("t1").zero_()
    assert torch.equal(file.get("t1"), saved["t1"])


def test_numbers_that_lie_askew_are_read(tmp_path):
    """A header of an odd length, which safetensors reads and does not write."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (1 - len(header) % 2)
    data = torch.tensor([1.0, -2.0]).numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert TensorFile(tmp_path / "x.safetensors").get("a").tolist() == [1.0, -2.0]


@pytest.mark.parametrize("most", [1, 3])
def test_items_come_in_order_and_few_are_begun_ahead(most, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    begun, lock = [], threading.Lock()

    def make(item: int) -> int:
        with lock:
            begun.append(item)
        return item * item

    for number, made in enumerate(in_order(make, range(20), most)):
        assert made == number * number and len(begun) <= number + 1 + most
    assert sorted(begun) == list(range(20))


def test_what_an_item_raises_is_raised_in_its_turn():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = in_order(lambda item: 1 / item, [2, 1, 0, 4], 2)
        assert [next(found), next(found)] == [0.5, 1.0]
        with pytest.raises(ZeroDivisionError):
            next(found)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
