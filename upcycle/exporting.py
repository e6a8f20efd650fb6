"""A mixture written as an ordinary class of transformers where one computes the same (native.py), else as a bundle.

A bundle is the mixture as it is, with the code that loads it where this package is not installed. Either has a model card.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from upcycle.assembly import REMOTE_CODE
from upcycle.card import model_card, read_facts
from upcycle.checkpoint import Checkpoint, CheckpointWriter, import_checkpoint
from upcycle.configuration import UpcycledConfig
from upcycle.directories import check_new, check_room, copy_companions, resolve
from upcycle.durable import atomic_directory
from upcycle.modeling import UpcycledForCausalLM
from upcycle.native import FORMATS, choose_format, native_config, native_tensors, notes
from upcycle.pieces import check_tensors
from upcycle.proof import TOLERANCE

SHORT_WINDOW = 8  # tokens, of the proof's 24
RECORDS = ("assembly.json", "proof.json")  # of a mixture's directory, kept in a bundle


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    format: a name in FORMATS or "remote_code". reasons: why it is no native class (empty if it is). notes: in what the
    native class differs although its logits are equal. difference: largest of the logits, as a share of the largest
    logit, fp32 (None for a bundle, whose weights are the same bytes).
    """

    path: Path
    format: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    difference: float | None = None


def export(
    directory: str | Path,
    out: str | Path,
    format: str = "auto",
    report: str | Path | None = None,
    max_shard_bytes: int = 4_000_000_000,
) -> Exported:
    """Write the mixture in `directory` into `out` as a native class, or as a remote-code bundle, with a model card.

    format: a name in FORMATS, "remote_code", or "auto": the first native class that computes the same function, else a
    bundle. A native class is read back with plain transformers and its logits are proved equal, also with left padding
    and a cache, before `out` appears. Memory: a few tensors, then one model in fp32 at a time (about twice its size
    while transformers stacks the experts it reads). directory: or the name of a mixture on the Hub. report: a run's
    report.json, for the card's figures.
    Raises ValueError: no mixture there, unknown format, `out` is not new or empty or cannot be written to, the mixture
    is not what `format` computes.
    """
    directory, out = resolve(directory), Path(out)
    if format not in (known := ("auto", *FORMATS, "remote_code")):
        raise ValueError(f"format={format!r} is not known; expected one of {', '.join(known)}")
    check_new(out)
    checkpoint = Checkpoint(directory)
    if (found := checkpoint.config.get("model_type")) != UpcycledConfig.model_type:
        raise ValueError(
            f"{directory}: model_type is {found!r}, expected {UpcycledConfig.model_type!r}; export takes a mixture that "
            "`upcycle` assembled or trained"
        )
    config: Any = UpcycledConfig.from_pretrained(directory)
    chosen, reasons = choose_format(config, format)
    facts = read_facts(directory, Path(report) if report else None)
    check_room(out, checkpoint.size_bytes())
    with atomic_directory(out) as partial:
        if chosen == "remote_code":
            _write_bundle(checkpoint, config, partial)
            exported = Exported(out, chosen, reasons)
        else:
            _write_native(checkpoint, config, chosen, partial, max_shard_bytes)
            difference = _prove_equal(directory, partial, chosen, config.vocab_size)
            exported = Exported(out, chosen, (), notes(config, chosen), difference)
        copy_companions(directory, partial)
        remarks = [*(f"No native class: {reason}" for reason in reasons), *exported.notes]
        (partial / "README.md").write_text(model_card(config, facts, chosen, remarks, out.name))
    return exported


def _write_native(checkpoint: Checkpoint, config: UpcycledConfig, format: str, out: Path, max_shard_bytes: int) -> None:
    writer = CheckpointWriter(out, max_shard_bytes)
    for name, tensor in native_tensors(checkpoint, config, format):
        writer.add(name, tensor)
    writer.close()
    target: Any = native_config(config, format)
    target.architectures = [FORMATS[format].architecture]
    target.dtype = config.dtype
    target.save_pretrained(out)


def _write_bundle(checkpoint: Checkpoint, config: UpcycledConfig, out: Path) -> None:
    """The mixture's own files, with this package's code and an `auto_map` that points to it.

    Raises ValueError: tensors that the code does not expect, or lacks.
    """
    check_tensors(checkpoint, config)
    import_checkpoint(checkpoint.directory, out)
    for name in RECORDS:
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, out / name)
    config.auto_map = UpcycledConfig().auto_map  # one from the Hub would point there
    config.name_or_path = ""
    config.save_pretrained(out)
    for name in REMOTE_CODE:
        shutil.copyfile(Path(__file__).parent / name, out / name)


def _prove_equal(mixture: Path, native: Path, format: str, vocab_size: int) -> float:
    """Read both back, one after the other, in fp32: the largest difference of logits, as a share of the largest.

    Raises ValueError: a tensor is missing or left over, or the logits differ.
    """
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(vocab_size, (2, 24), generator=generator)
    mask_BS = torch.ones_like(tokens_BS)
    mask_BS[1, :7] = 0
    # No name holds the mixture, so it is freed before as large a model is read.
    ours = _logits(UpcycledForCausalLM.from_pretrained(mixture, dtype=torch.float32), tokens_BS, mask_BS)
    read: Any = AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32, output_loading_info=True)
    model, info = read
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, tensors in problems.items():
        if tensors:
            raise ValueError(
                f"{mixture}: as {FORMATS[format].title}, {kind.replace('_', ' ')}: {', '.join(tensors[:5])} "
                f'({len(tensors)} in all); use format="remote_code"'
            )
    difference = ((_logits(model, tokens_BS, mask_BS) - ours).abs().max() / ours.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{mixture}: as {FORMATS[format].title} its logits differ by {difference:.2e} of the largest, expected at most "
            f'{TOLERANCE}; use format="remote_code", which keeps the mixture as it is'
        )
    return difference


@torch.no_grad()
def _logits(model: Any, tokens_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """(tokens, V): logits of all valid tokens, of the last ones again after a cache of the others, and of all once more
    with any sliding window shortened to less than the text: a window that is lost shows."""
    model.eval()
    whole = model(tokens_BS, attention_mask=mask_BS).logits[mask_BS.bool()]
    past = model(tokens_BS[:, :-1], attention_mask=mask_BS[:, :-1], use_cache=True).past_key_values
    last = model(tokens_BS[:, -1:], attention_mask=mask_BS, past_key_values=past).logits[:, -1]
    config = getattr(model.config, "seed", model.config)
    if getattr(config, "sliding_window", None):
        config.sliding_window = SHORT_WINDOW
    return torch.cat([whole, last, model(tokens_BS, attention_mask=mask_BS).logits[mask_BS.bool()]])
