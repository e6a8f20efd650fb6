"""Where models come from: directories, names on the Hub, and the layout of the Hub's cache with its links."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import dense_models, tokens
from upcycle.checkpoint import Checkpoint, CheckpointWriter, import_checkpoint
from upcycle.directories import copy_companions, fingerprint, model_files, read_config, resolve

ROOT = Path(__file__).resolve().parent.parent
SHA, OLDER = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Sharded, tied and in bfloat16, as plain transformers writes it."""
    path = tmp_path_factory.mktemp("plain")
    (model,) = dense_models("llama", 1, dtype=torch.bfloat16, tie_word_embeddings=True)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.save_pretrained(path, max_shard_size="20KB")
    (path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return path


def cached(source, cache, model="org/name", revision="main", sha=SHA):
    """`source` as the Hub's cache holds it: blobs by hash, snapshots of links to them, refs."""
    folder = cache / f"models--{model.replace('/', '--')}"
    snapshot = folder / "snapshots" / sha
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(source.iterdir())):
        blob = folder / "blobs" / f"{sha[:4]}{number:04}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    (folder / "refs" / revision).write_text(sha)
    return snapshot


def test_a_directory_is_itself(plain, tmp_path, monkeypatch):
    assert resolve(plain) == resolve(str(plain)) == plain
    monkeypatch.setenv("HOME", str(plain.parent))
    assert resolve(f"~/{plain.name}") == plain


def test_a_hub_name_is_found_in_the_cache(plain, tmp_path):
    snapshot = cached(plain, tmp_path)
    assert resolve("org/name", tmp_path) == snapshot
    assert resolve(f"org/name@{SHA}", tmp_path) == snapshot
    older = cached(plain, tmp_path, revision="v1.0", sha=OLDER)
    assert resolve("org/name@v1.0", tmp_path) == older and resolve("org/name@main", tmp_path) == snapshot


def test_the_caches_own_folder_stands_for_its_main_branch(plain, tmp_path):
    snapshot = cached(plain, tmp_path)
    cached(plain, tmp_path, revision="v1.0", sha=OLDER)
    folder = tmp_path / "models--org--name"
    assert resolve(folder) == snapshot
    (folder / "refs" / "main").unlink()
    with pytest.raises(ValueError) as error:
        resolve(folder)
    assert str(error.value) == (
        f"{folder}: a folder of the Hub's cache with 2 snapshots and no whole main branch; give the directory of one "
        "snapshot"
    )
    shutil.rmtree(folder / "snapshots" / OLDER)
    assert resolve(folder) == snapshot


def test_what_is_neither_a_directory_nor_cached_is_named_with_both(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached(plain, tmp_path / "cache")
    for name, command in (("org/other", "org/other"), ("org/name@v9", "org/name --revision v9")):
        with pytest.raises(ValueError) as error:
            resolve(name, tmp_path / "cache")
        assert str(error.value) == (
            f"{name}: no directory {tmp_path / name}, and the Hub's model {name} is not whole in the cache "
            f"{tmp_path / 'cache'} and was not downloaded (HF_HUB_OFFLINE=1 forbids downloads); check the name, or fetch "
            f"it where the Hub can be reached (hf download {command})"
        )
    for path in ("name", "/no/such/dir", "../org/name", "a/b/c"):
        with pytest.raises(ValueError) as error:
            resolve(path)
        assert str(error.value) == (
            f"{path}: no such directory, and not the name of a model on the Hub (org/name or org/name@revision); check "
            "the path"
        )
    with pytest.raises(ValueError) as error:
        resolve(plain / "config.json")
    assert str(error.value) == (
        f"{plain / 'config.json'}: is a file, expected a model directory; give the directory that holds it"
    )


def test_only_what_a_model_needs_is_downloaded(plain, tmp_path, monkeypatch):
    """With the Hub replaced: what is asked of it, and that one run asks once."""
    asked = []

    def download(model, **options):
        asked.append((model, options))
        return str(plain)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("org/fresh@v2", tmp_path) == resolve("org/fresh@v2", tmp_path) == plain
    ((model, options),) = asked
    assert model == "org/fresh" and options["revision"] == "v2" and options["cache_dir"] == tmp_path
    from huggingface_hub.utils import filter_repo_objects

    there = [
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
        "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja",
    ]  # fmt: skip
    others = [
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.safetensors", "original/model.safetensors",
        "onnx/config.json", "modeling_own.py", "adapter_model.safetensors", "training_args.bin",
    ]  # fmt: skip
    assert list(filter_repo_objects(there + others, allow_patterns=options["allow_patterns"])) == there


def test_links_and_copies_are_one_model(plain, tmp_path):
    snapshot = cached(plain, tmp_path / "cache")
    assert all(path.is_symlink() for path in model_files(snapshot))
    assert fingerprint(snapshot) == fingerprint(plain)
    assert {"generation_config.json", "tokenizer.json", "config.json"} < set(fingerprint(plain))
    out = tmp_path / "out"
    out.mkdir()
    import_checkpoint(snapshot, out)
    assert fingerprint(out) == fingerprint(plain) and not any(path.is_symlink() for path in out.iterdir())
    dense, ours = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (plain, out))
    assert ours.dtype == torch.bfloat16 and torch.equal(ours(tokens()).logits, dense(tokens()).logits)
    assert ours.generation_config.temperature == 0.5


def test_a_pruned_blob_is_a_missing_shard(plain, tmp_path):
    snapshot = cached(plain, tmp_path)
    shard = sorted(snapshot.glob("model-*.safetensors"))[1]
    shard.resolve().unlink()
    with pytest.raises(ValueError) as error:
        model_files(snapshot)
    assert str(error.value) == f"{shard}: the index names this shard but it is missing; copy the whole directory again"


def test_imports_take_the_model_and_nothing_else(plain, tmp_path):
    source, out = shutil.copytree(plain, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (source / "consolidated.safetensors").write_bytes(b"not even safetensors")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / "modeling_own.py").write_text("raise SystemExit")
    import_checkpoint(source, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in plain.iterdir()} - {"README.md"}


def test_companions_are_tokenizer_and_generation_settings(plain, tmp_path):
    copy_companions(plain, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generation_config.json", "tokenizer.json"]


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError) as error:
        read_config(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: no config.json there; expected a Hugging Face model directory (it holds an adapter: merge that into "
        "its model and save the whole)"
    )


def test_what_the_writer_writes_is_read_back(tmp_path):
    writer = CheckpointWriter(tmp_path, max_shard_bytes=100)
    tensors = {name: torch.randn(5, 3) for name in "abc"}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = Checkpoint(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    assert all(torch.equal(found.get(name), tensor) for name, tensor in tensors.items())


def test_the_environments_cache_is_used_and_torch_is_not(plain, tmp_path):
    snapshot = cached(plain, tmp_path / "hub")
    code = (
        "import sys; from upcycle.directories import fingerprint, resolve; path = resolve('org/name'); fingerprint(path); "
        "assert not {'torch', 'transformers'} & set(sys.modules); print(path)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(snapshot)
