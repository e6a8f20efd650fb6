"""The `upcycle` command: a few words of its own; everything else goes to the pipeline as Hydra overrides."""

from __future__ import annotations

import sys
from itertools import takewhile

USAGE = """\
upcycle                        run the demo: pretrain a seed, branch, assemble BTX and BAM, train, compare
upcycle key=value ...          the same with other settings; experiment=tiny is a one-minute walk
upcycle plan=true              what would run, what it would cost, what is done already; computes nothing
upcycle stage=branch/code      one stage only
upcycle -m key=a,b ...         a sweep; runs share every artifact they can
upcycle status [RUN ...]       the runs here and how far they are
upcycle report [RUN ...]       print a run's table again; --readme writes it into README.md
upcycle replicates RUN RUN ... spread and claims over runs that differ in rng_seed; --readme, --json=FILE
"""


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("--help", "-h", "help"):
        print(USAGE)
        print("Settings, as composed by Hydra (upcycle --hydra-help tells more):\n")
        sys.argv[1:] = ["--cfg", "job"]
    elif arguments and arguments[0] in WORDS:
        sys.exit(WORDS[arguments[0]](arguments[1:]))
    elif (unknown := unknown_word(arguments)) is not None:
        from launch.config import nearest

        words = ["help", *WORDS]
        guess = f"no such word{nearest(unknown, words)} Words: {', '.join(words)}"
        print(f"upcycle: {unknown}: {guess}; settings are key=value (upcycle --help shows them)", file=sys.stderr)
        sys.exit(2)
    from launch.pipeline import main as pipeline

    pipeline()


def unknown_word(arguments: list[str]) -> str | None:
    """The first argument that is neither a setting nor an option; what follows an option may be its value."""
    for argument in takewhile(lambda argument: not argument.startswith("-"), arguments):
        if "=" not in argument and not argument.startswith(("+", "~")):
            return argument
    return None


def status(arguments: list[str]) -> int:
    from launch.status import print_status

    return print_status(arguments)


def report(arguments: list[str]) -> int:
    from launch.status import print_reports

    return print_reports(arguments)


def replicates(arguments: list[str]) -> int:
    from launch.status import print_replicates

    return print_replicates(arguments)


WORDS = {"status": status, "report": report, "replicates": replicates}

if __name__ == "__main__":
    main()
