"""The `upcycle` command: a few words of its own; everything else goes to the pipeline as Hydra overrides."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import takewhile

USAGE = """\
upcycle                        run the demo: pretrain a seed, branch, assemble BTX and BAM, train, compare
upcycle key=value ...          the same with other settings; experiment=tiny is a one-minute walk
upcycle plan=true              what would run, what it would cost, what is done already; makes nothing (budget= is measured)
upcycle stage=branch/code      one stage only
upcycle tokens=50M             that many for branches and mixture together; budget=2h: as many as that time is enough for
upcycle -m key=a,b ...         a sweep; runs share every artifact they can (docs/cluster.md); hydra/launcher=processes: side by side
upcycle sweep NAME             write and print a sweep's table again, of what is done by now
upcycle status [NAME ...]      the runs here and how far they are; of one run every stage, and its job; of a sweep every point
upcycle launch=slurm ...       submit what is missing as jobs of Slurm and return; dry_run=true prints the scripts (docs/cluster.md)
upcycle cancel NAME            take a run's or sweep's jobs out of Slurm's queue, but for those that other runs need
upcycle explain DIR            what each tensor of a mixture came from, its routers, its size; how a merged model was merged; --all, --json
upcycle doctor DIR|RUN         what is wrong with a mixture, in training too, and what to do about it; --json, --prove
upcycle prune                  artifacts that no run here refers to, with their sizes; --yes removes them
upcycle report [RUN ...]       print a run's table again (of the newest without a name); --readme writes it into README.md; of several runs also what they say
                               of the models they share; --html=OUT.html
upcycle export DIR OUT         a mixture as Mixtral, Qwen2-MoE, Qwen3-MoE or FlexOlmo where it equals one, else with its code;
                               --format=NAME, --report=RUN/report.json
upcycle add DIR BRANCH OUT --name=NAME
                               a mixture with a branch as one more expert; --router-row=mean, zeros, normal or an expert's name
upcycle remove DIR NAME OUT    a mixture without one of its experts
upcycle dense DIR OUT          a mixture as a dense model again: --expert=NAME, or --merge=average of all (the default)
upcycle fold DIR OUT           a CAMEx mixture with its curvature folded into its experts: plain soft merging
upcycle route DIR TEXT|FILE OUT.html
                               a page of the text and what the mixture says next, each token by its expert; --new-tokens=N
upcycle replicates RUN RUN ... spread and claims over runs that differ in rng_seed; --against=MODEL,... adds paired differences; --readme,
                               --json=FILE
"""


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("--help", "-h", "help"):
        print(USAGE)
        print("Settings, as composed by Hydra (upcycle --hydra-help tells more):\n")
        sys.argv[1:] = ["--cfg", "job"]
    elif arguments and arguments[0] in WORDS:
        sys.exit(_spoken(WORDS[arguments[0]], arguments[1:]))
    elif (unknown := unknown_word(arguments)) is not None:
        from upcycle.config import nearest

        words = ["help", *WORDS]
        guess = f"no such word{nearest(unknown, words)} Words: {', '.join(words)}"
        print(f"upcycle: {unknown}: {guess}; settings are key=value (upcycle --help shows them)", file=sys.stderr)
        sys.exit(2)
    from launch.pipeline import main as pipeline

    pipeline()


def _spoken(word: Callable[[list[str]], int], arguments: list[str]) -> int:
    """A word's exit code; a reader that has seen enough, such as `head`, is no error."""
    try:
        code = word(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def unknown_word(arguments: list[str]) -> str | None:
    """The first argument that is neither a setting nor an option; what follows an option may be its value."""
    for argument in takewhile(lambda argument: not argument.startswith("-"), arguments):
        if "=" not in argument and not argument.startswith(("+", "~")):
            return argument
    return None


def status(arguments: list[str]) -> int:
    from launch.status import print_status

    return print_status(arguments)


def cancel(arguments: list[str]) -> int:
    from launch.status import print_cancelled

    return print_cancelled(arguments)


def sweep(arguments: list[str]) -> int:
    from launch.status import print_sweep

    return print_sweep(arguments)


def prune(arguments: list[str]) -> int:
    import launch.prune

    return launch.prune.prune(arguments)


def explain(arguments: list[str]) -> int:
    """Print what a mixture is made of; 2 for what the user can mend."""
    options = {argument for argument in arguments if argument.startswith("--")}
    paths = [argument for argument in arguments if argument not in options]
    if len(paths) != 1 or not options <= {"--all", "--json"}:
        got = " ".join(arguments) or "nothing"
        print(f"upcycle: explain: got {got}, expected DIR [--all] [--json]", file=sys.stderr)
        return 2
    import json
    from pathlib import Path

    from upcycle.explain import explain as read
    from upcycle.merged import RECORD, is_merged, merge_in_words

    try:
        if is_merged(where := Path(paths[0])):
            print((where / RECORD).read_text() if "--json" in options else merge_in_words(where, "--all" in options))
            return 0
        found = read(paths[0])
    except (ValueError, OSError) as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_dict(), indent=1) if "--json" in options else found.text("--all" in options))
    return 0


def doctor(arguments: list[str]) -> int:
    import launch.doctor

    return launch.doctor.doctor(arguments)


def report(arguments: list[str]) -> int:
    from launch.status import print_reports

    return print_reports(arguments)


def replicates(arguments: list[str]) -> int:
    from launch.status import print_replicates

    return print_replicates(arguments)


def export(arguments: list[str]) -> int:
    """Print what was written and why; 2 for what the user can mend."""
    options = dict(
        argument[2:].split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument
    )
    paths = [argument for argument in arguments if not argument.startswith("--")]
    if len(paths) != 2 or len(paths) + len(options) != len(arguments) or not options.keys() <= {"format", "report"}:
        got = " ".join(arguments) or "nothing"
        print(f"upcycle: export: got {got}, expected DIR OUT [--format=NAME] [--report=FILE]", file=sys.stderr)
        return 2
    from transformers.utils import logging

    from upcycle.exporting import export as write_export

    logging.disable_progress_bar()
    try:
        written = write_export(*paths, **options)
    except (ValueError, OSError) as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    for reason in written.reasons:
        print(f"no native class: {reason}")
    equal = "" if written.difference is None else f"; logits equal within {written.difference:.1e} of the largest"
    print(f"{written.path}: {written.format}{equal}")
    for note in written.notes:
        print(f"note: {note}")
    return 0


def _edit(word: str) -> Callable[[list[str]], int]:
    def run(arguments: list[str]) -> int:
        import launch.edits

        return getattr(launch.edits, word)(arguments)

    return run


def route(arguments: list[str]) -> int:
    from launch.route import route

    return route(arguments)


WORDS = {
    "explain": explain, "doctor": doctor, "export": export, "status": status, "report": report, "replicates": replicates,
    "add": _edit("add"), "remove": _edit("remove"), "dense": _edit("dense"), "fold": _edit("fold"),
    "route": route, "prune": prune, "cancel": cancel, "sweep": sweep,
}  # fmt: skip

if __name__ == "__main__":
    main()
