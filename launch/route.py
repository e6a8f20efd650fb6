"""The word `upcycle route`: a page of a text's tokens by the experts they go to; 2 for what the user can mend."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.edits import parsed, usage

EXPECTED = "DIR TEXT|FILE OUT.html [--new-tokens=N]"
NEW_TOKENS = 40


def route(arguments: list[str]) -> int:
    paths, options = parsed(arguments)
    count = options.get("new-tokens", str(NEW_TOKENS))
    if len(paths) != 3 or not options.keys() <= {"new-tokens"} or not count.isdigit() or not paths[2].endswith(".html"):
        return usage("route", arguments, EXPECTED)
    directory, text, out = paths[0], paths[1], Path(paths[2])
    from transformers.utils import logging

    from evals.route import read_routes, render_routes

    logging.disable_progress_bar()
    try:
        if not out.absolute().parent.is_dir():
            raise ValueError(f"{out}: there is no directory {out.absolute().parent}; make it, or write elsewhere")
        routes = read_routes(directory, _read(text), int(count))
        out.write_text(render_routes(routes, Path(directory).absolute().name), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    said = len(routes["tokens"]) - routes["prompt"]
    print(f"{out}: {routes['prompt']} tokens of text and {said} that follow, by expert")
    return 0


def _read(text: str) -> str:
    """The file of that name, if there is one, else the words themselves."""
    try:
        return Path(text).read_text(encoding="utf-8") if Path(text).is_file() else text
    except OSError:  # a long text is no name of a file
        return text
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: not UTF-8 text ({error}); give another file") from None
