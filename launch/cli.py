"""The `upcycle` command: a few words of its own; everything else goes to the pipeline as Hydra overrides."""

from __future__ import annotations

import sys

USAGE = """\
upcycle                        run the demo: pretrain a seed, branch, assemble BTX and BAM, train, compare
upcycle key=value ...          the same with other settings; experiment=tiny is a two-minute walk
upcycle plan=true              what would run, what it would cost, what is done already; computes nothing
upcycle stage=branch/code      one stage only
upcycle -m key=a,b ...         a sweep; runs share every artifact they can
upcycle status [RUN ...]       the runs here and how far they are
upcycle report [RUN ...]       print a run's table again; --readme writes it into README.md
"""


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("--help", "-h", "help"):
        print(USAGE)
        print("Settings, as composed by Hydra (upcycle --hydra-help tells more):\n")
        sys.argv[1:] = ["--cfg", "job"]
    elif arguments and arguments[0] in WORDS:
        sys.exit(WORDS[arguments[0]](arguments[1:]))
    from launch.pipeline import main as pipeline

    pipeline()


def status(arguments: list[str]) -> int:
    from launch.status import print_status

    return print_status(arguments)


def report(arguments: list[str]) -> int:
    from launch.status import print_reports

    return print_reports(arguments)


WORDS = {"status": status, "report": report}

if __name__ == "__main__":
    main()
