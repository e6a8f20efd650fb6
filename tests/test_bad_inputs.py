"""What a user can get wrong, and the very words that say so. Preflight's differences are in test_preflight.py, settings in
test_config.py and test_launch.py."""

import ctypes
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import upcycle
from launch.checks import _check_checkpoint
from tests.tiny import dense_models
from upcycle.assembly import write_mixture
from upcycle.batches import TokenArray
from upcycle.checkpoint import Checkpoint, CheckpointWriter, import_checkpoint
from upcycle.config import DataConfig, DomainConfig
from upcycle.data import collect_domain
from upcycle.directories import check_room, fingerprint, model_files
from upcycle.mixture_config import AssembleConfig
from upcycle.stages import import_model
from upcycle.store import Run, Store

ROOT = Path(__file__).resolve().parent.parent
DISK_BYTES = 200 * 1024


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, model in zip(("seed", "code"), dense_models("llama", 2, dtype=torch.float32), strict=True):
        model.save_pretrained(root / name)
    (large,) = dense_models("llama", 1, dtype=torch.float32, vocab_size=1000)
    large.save_pretrained(root / "large")
    assert (root / "large" / "model.safetensors").stat().st_size > DISK_BYTES
    return root


def message_of(call, *arguments, **keywords):
    with pytest.raises(ValueError) as error:
        call(*arguments, **keywords)
    return str(error.value)


# Checkpoints named in the settings ------------------------------------------------------------------------------------


def test_any_decoder_in_safetensors_passes_the_settings(models, tmp_path):
    """Whether its family is supported is the library's to say."""
    _check_checkpoint("seed.path", str(models / "seed"))
    _check_checkpoint("seed.path", None)
    other = shutil.copytree(models / "seed", tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "never_heard_of"}')
    _check_checkpoint("seed.path", str(other))


def test_a_hub_name_that_is_not_cached_is_named_under_its_key(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert message_of(_check_checkpoint, "seed.path", "org/name") == (
        f"seed.path=org/name: no directory {tmp_path / 'org' / 'name'}, and the Hub's model org/name is not whole in the "
        f"cache {tmp_path / 'cache'} and was not downloaded (HF_HUB_OFFLINE=1 forbids downloads); check the name, or fetch "
        "it where the Hub can be reached (hf download org/name)"
    )


BROKEN = {
    "no config": (
        lambda path: (path / "config.json").unlink(),
        "branches.code.path={path}: no config.json there; expected a Hugging Face model directory",
    ),
    "not a config": (
        lambda path: (path / "config.json").write_text("nonsense"),
        "branches.code.path={path}: {path}/config.json: not whole JSON (Expecting value: line 1 column 1 (char 0)); copy it again",
    ),
    "another config": (
        lambda path: (path / "config.json").write_text('["model_type"]'),
        "branches.code.path={path}: {path}/config.json names no model_type, expected a Hugging Face config; save the model "
        "again",
    ),
    "quantised": (
        lambda path: (path / "config.json").write_text(
            '{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}'
        ),
        "branches.code.path={path}: quantization_config in config.json says that the weights are quantised (fp8), expected "
        "plain float32, bfloat16 or float16; load it, call model.dequantize(), delete model.config.quantization_config and "
        "save_pretrained it elsewhere",
    ),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        "branches.code.path={path}: expected weights in safetensors, found none; save the model again with save_pretrained "
        "(safetensors is its default)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_directory_that_is_no_model_is_named_under_its_key(models, tmp_path, kind):
    harm, message = BROKEN[kind]
    path = shutil.copytree(models / "code", tmp_path / "code")
    harm(path)
    assert message_of(_check_checkpoint, "branches.code.path", str(path)) == message.format(path=path)


class Plant:
    """A pickle that creates a file when it is opened."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (open, (str(self.witness), "w"))


@pytest.mark.filterwarnings("ignore:branch")
def test_a_pickle_is_refused_and_never_opened(models, tmp_path):
    witness = tmp_path / "opened"
    planted = pickle.dumps(Plant(witness))
    pickle.loads(planted).close()
    assert witness.exists()  # it would tell
    witness.unlink()

    path = shutil.copytree(models / "code", tmp_path / "code")
    (path / "pytorch_model.bin").write_bytes(planted)
    upcycle.assemble(seed=models / "seed", branches={"code": path}, out=tmp_path / "moe")  # safetensors beside it
    assert path / "pytorch_model.bin" not in model_files(path)
    (path / "model.safetensors").unlink()
    message = (
        "expected weights in safetensors, found pytorch_model.bin, which may run code when opened; save the model again "
        "with save_pretrained (safetensors is its default)"
    )
    assert message_of(Checkpoint, path) == f"{path}: {message}"
    assert message_of(_check_checkpoint, "seed.path", str(path)) == f"seed.path={path}: {message}"
    (tmp_path / "out").mkdir()
    assert message_of(import_checkpoint, path, tmp_path / "out") == f"{path}: {message}"
    arguments = {"seed": models / "seed", "branches": {"code": path}, "out": tmp_path / "again"}
    assert message_of(upcycle.assemble, **arguments) == f"{path}: {message}"
    assert not witness.exists() and not (tmp_path / "again").exists() and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_no_number_is_named(models, tmp_path, name, value):
    path, out = shutil.copytree(models / "code", tmp_path / "code"), tmp_path / "moe"
    tensors = load_file(path / "model.safetensors")
    tensors[name][3, 3] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    out.mkdir()
    message = message_of(write_mixture, models / "seed", {"code": path}, out, AssembleConfig())
    assert message == f"{path}: {name} holds NaN or infinite values; mend that checkpoint"
    assert not (out / "config.json").exists() and not list(out.glob("model*.safetensors"))


# Names and places -----------------------------------------------------------------------------------------------------


def test_a_branch_called_seed_is_refused(models, tmp_path):
    arguments = {"seed": models / "seed", "branches": {"seed": models / "code"}, "out": tmp_path / "moe"}
    assert message_of(upcycle.assemble, **arguments) == (
        "a branch is called 'seed'; that name belongs to the seed's own expert, rename the branch"
    )


def test_a_directory_in_use_is_not_written_to(models, tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "precious").write_text("x")
    arguments = {"seed": models / "seed", "branches": {"code": models / "code"}, "out": tmp_path / "moe"}
    assert message_of(upcycle.assemble, **arguments) == (
        f"out={tmp_path / 'moe'} exists already and is not an empty directory; name one that is, or a new one"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["moe"] and (tmp_path / "moe" / "precious").exists()


def test_a_branch_that_a_file_names_twice_is_refused(tmp_path):
    """YAML allows it, and would silently keep the second."""
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\nbranches:\n  code: {path: a}\n  code: {path: b}\n")
    command = [sys.executable, "-m", "launch.cli", "plan=true", "experiment=mine", "--config-dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        f'upcycle: ConstructorError: while constructing a mapping\n  in "{file}", line 3, column 3\n'
        f'found duplicate key code\n  in "{file}", line 4, column 3'
    )


# Data -----------------------------------------------------------------------------------------------------------------


def test_a_domain_of_empty_documents_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", "  \n", "")))
    domain = DomainConfig(source="json", path=str(path))
    assert message_of(collect_domain, domain, DataConfig(), tmp_path / "out") == (
        f"domain {path} has 3 documents and all are empty; check text_column"
    )


def test_a_domain_shorter_than_a_sequence_is_refused(tmp_path):
    for part, array in (("tokens", np.arange(99)), ("offsets", np.array([0, 99])), ("bytes", np.array([300]))):
        np.save(tmp_path / f"train.{part}.npy", array)
    assert message_of(TokenArray, tmp_path, "train", 100) == (
        f"{tmp_path / 'train.tokens.npy'} has 99 tokens, fewer than one sequence of 100; add documents, raise the split's "
        "share or shorten sequence_length"
    )


# Disks ----------------------------------------------------------------------------------------------------------------


def mounted(where, *options):
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(where)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def full_disk(tmp_path):
    """(directory, whether the disk itself is small). Where nobody may mount one, files above DISK_BYTES fail instead."""
    where = tmp_path / "disk"
    where.mkdir()
    if mounted(where, f"size={DISK_BYTES}"):
        yield where, True
        subprocess.run(["umount", "--lazy", str(where)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK_BYTES, limits[1]))
    yield where, False
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def capabilities(version=0x20080522):
    """The process's capabilities as Linux lays them out: (header, six words of which 0 and 3 are in effect)."""
    header, words = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capget(header, words) == 0
    return header, words


@pytest.fixture
def read_only(models, tmp_path):
    """(directory with the seed, why it cannot be written to): a read-only file system; where none can be mounted, modes."""
    where = tmp_path / "disk"
    where.mkdir()
    if mounted(where, "size=4m"):
        shutil.copytree(models / "seed", where / "seed")
        subprocess.run(["mount", "-o", "remount,ro", str(where)], check=True)
        yield where, "its file system is read-only"
        subprocess.run(["umount", "--lazy", str(where)], check=True)
        return
    shutil.copytree(models / "seed", where / "seed")
    where.chmod(0o555)
    header, words = capabilities()
    held = words[0]
    words[0] &= ~0b110  # modes bind root too without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert ctypes.CDLL(None).capset(header, words) == 0
    yield where, f"no permission to write in {where}"
    words[0] = held
    assert ctypes.CDLL(None).capset(header, words) == 0
    where.chmod(0o755)


def test_a_full_disk_stops_an_import_with_path_and_bytes(full_disk, models):
    where, small = full_disk
    source = models / "large"
    total = sum(path.stat().st_size for path in model_files(source))
    store = Store(where / "artifacts")
    stage = store.stage("seed", import_model, None, fingerprint(source), {"path": str(source)})
    message = message_of(store.make, stage, Run(say=lambda text: None))
    if small:
        assert message == (
            f"{stage.partial}: {total:,} bytes are to be written, but only {DISK_BYTES:,} are free there; free some space or "
            "choose another disk"
        )
    else:
        size = (source / "model.safetensors").stat().st_size
        assert message == (
            f"{stage.partial / 'model.safetensors'}: could not write its {size:,} bytes (File too large); "
            f"{source} needs {total:,} bytes there"
        )
    assert not stage.finished and not stage.path.exists() and not (stage.partial / "config.json").exists()


@pytest.mark.filterwarnings("ignore:branch")
def test_a_full_disk_stops_an_assembly_and_leaves_nothing(full_disk, models):
    where, small = full_disk
    message = message_of(
        upcycle.assemble, seed=models / "large", branches={"code": models / "large"}, out=where / "moe", method="bam"
    )
    assert message.startswith(f"{where / 'moe'}")
    if small:
        assert re.search(
            r": [\d,]+ bytes are to be written, but only [\d,]+ are free there; free some space or", message
        )
    else:
        assert re.search(r": could not write its [\d,]+ bytes \(.*File too large.*\)", message)
    assert not list(where.iterdir())


def test_a_disk_that_fills_while_a_shard_is_written(full_disk):
    """The weights fit, the shard that they are copied to does not beside them."""
    where, small = full_disk
    writer = CheckpointWriter(where, max_shard_bytes=10**9)
    for number in range(64):
        writer.add(f"a rather long name of one small tensor, number {number}", torch.zeros(DISK_BYTES // 4 // 64))
    message = message_of(writer.close)
    if small:
        said = (
            f"{DISK_BYTES:,} bytes are to be written, but only 0 are free there; free some space or choose another disk"
        )
        assert message == f"{where}: {said}"
    else:
        assert message == f"{where / 'shard-0.safetensors'}: could not write its {DISK_BYTES:,} bytes (File too large)"
    assert not list(where.glob("model*"))


def test_a_mixture_that_will_not_fit_is_refused_before_its_first_tensor(full_disk):
    where, small = full_disk
    needed = 10**15  # more than any disk
    free = shutil.disk_usage(where).free
    assert message_of(CheckpointWriter, where / "moe", 10**9, needed) == (
        f"{where / 'moe'}: 1,000,001,000,000,000 bytes are to be written, but only {free:,} are free there; free some space "
        "or choose another disk"
    )
    assert free == DISK_BYTES or not small


def test_a_read_only_directory_is_named(read_only, models):
    where, reason = read_only
    end = f"cannot write there, {reason}; choose another directory"
    assert message_of(check_room, where) == f"{where}: {end}"
    assert message_of(CheckpointWriter, where / "moe", 10**9) == f"{where / 'moe'}: {end}"
    assert message_of(import_checkpoint, models / "code", where) == f"{where}: {end}"


def test_models_may_lie_in_a_read_only_directory(read_only, models, tmp_path):
    where, _ = read_only
    (tmp_path / "out").mkdir()
    import_checkpoint(where / "seed", tmp_path / "out")
    assert fingerprint(tmp_path / "out") == fingerprint(where / "seed") == fingerprint(models / "seed")
