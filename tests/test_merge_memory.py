"""What a merge holds in memory, and the files that are written for it tensor by tensor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import dense_models
from upcycle.checkpoint import CheckpointWriter
from upcycle.config import CurvatureConfig
from upcycle.curvature import write_statistics

ROOT = Path(__file__).resolve().parent.parent

MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
import upcycle.dense_merge
from upcycle.merge_config import MergeConfig

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024

root, ended, peak = Path(sys.argv[1]), False, 0
def watch():
    global peak
    while not ended:
        peak = max(peak, resident())
        time.sleep(0.001)

def merge(root):
    out = root / "out"
    out.mkdir()
    branches = {path.name: path for path in root.glob("branch*")}
    measured = {name: [root / f"fisher-{name}"] for name in ("seed", *branches)} if sys.argv[2] == "fisher" else None
    upcycle.dense_merge.write_merged(root / "seed", branches, out, MergeConfig(method=sys.argv[2]), statistics=measured)

merge(Path(sys.argv[3]))  # of small models, for what is imported on the way
before, thread = resident(), threading.Thread(target=watch)
thread.start()
merge(root)
ended = True
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "ties", "fisher"])
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, method):
    """Resident pages above the imports, of files that are mapped too: 6 layers more are 79 MB of weights in each model."""
    peaks = {layers: peak_of(tmp_path / str(layers), method, layers=layers) for layers in (2, 8)}
    assert peaks[8] - peaks[2] < 16e6, peaks


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "ties"])
def test_memory_hardly_grows_with_the_number_of_models(tmp_path, method):
    """The report looks at the pages of all of them at once: one tensor of 3.1 MB each, and a few blocks of 4."""
    peaks = {count: peak_of(tmp_path / str(count), method, branches=count) for count in (2, 8)}
    assert peaks[8] - peaks[2] < 6 * 12e6, peaks


def peak_of(root: Path, method: str, layers: int = 2, branches: int = 3) -> int:
    for hidden in (32, 512):
        model = dense_models(
            "llama", 1, dtype=torch.float32, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers
        )[0]
        for name in ("seed", *(f"branch{number}" for number in range(branches))):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
            model.save_pretrained(root / str(hidden) / name)
            if method == "fisher":
                squares = {f"fisher/{tensor}": one.detach().square() for tensor, one in model.named_parameters()}
                (measured := root / str(hidden) / f"fisher-{name}").mkdir()
                write_statistics(squares, CurvatureConfig(), {}, measured)
    command = [sys.executable, "-c", MEASURE, str(root / "512"), method, str(root / "32")]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_written_file_is_what_safetensors_writes(tmp_path):
    """As large, and with the same tensors: kinds of numbers that are mixed, scalars and nothing."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    expected = {f"t{n}": torch.randn(n + 1, 3).to(dtypes[n % 4]) for n in range(9)}
    expected |= {"scalar": torch.tensor(2.5), "turned": torch.randn(3, 5).T, "empty": torch.zeros(0, 4)}
    writer = CheckpointWriter(tmp_path, max_shard_bytes=10**6)
    for name, tensor in expected.items():
        writer.add(name, tensor)
    assert [path.name for path in tmp_path.iterdir()] == []  # what waits has no name
    writer.close()
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items())
    theirs = {name: tensor.contiguous() for name, tensor in expected.items()}
    save_file(theirs, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").stat().st_size == (tmp_path / "theirs.safetensors").stat().st_size
