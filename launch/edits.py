"""The words that edit a mixture: `upcycle add`, `upcycle remove`, `upcycle dense`, `upcycle fold`; 2 for what the user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

ADD = "DIR BRANCH OUT --name=NAME [--router-row=mean|zeros|normal|EXPERT] [--no-proof]"
REMOVE = "DIR NAME OUT [--no-proof]"
FOLD = "DIR OUT [--no-proof]"
DENSE = "DIR OUT [--expert=NAME | --merge=average] [--no-proof]"


def add(arguments: list[str]) -> int:
    paths, options = parsed(arguments)
    if len(paths) != 3 or "name" not in options or not options.keys() <= {"name", "router-row", "no-proof"}:
        return usage("add", arguments, ADD)

    def edit() -> Any:
        from upcycle.editing import add_expert

        return add_expert(*paths, options["name"], options.get("router-row"), prove="no-proof" not in options)

    return _done(edit, lambda found: f"experts {', '.join(found.experts)}", "each expert alone gives its logits")


def remove(arguments: list[str]) -> int:
    paths, options = parsed(arguments)
    if len(paths) != 3 or not options.keys() <= {"no-proof"}:
        return usage("remove", arguments, REMOVE)

    def edit() -> Any:
        from upcycle.editing import remove_expert

        return remove_expert(*paths, prove="no-proof" not in options)

    return _done(edit, lambda found: f"experts {', '.join(found.experts)}", "each expert alone gives its logits")


def dense(arguments: list[str]) -> int:
    paths, options = parsed(arguments)
    both = {"expert", "merge"} <= options.keys()
    if len(paths) != 2 or both or not options.keys() <= {"expert", "merge", "no-proof"}:
        return usage("dense", arguments, DENSE)

    def edit() -> Any:
        from upcycle.dense import to_dense

        chosen = {name: options[name] for name in ("expert", "merge") if name in options}
        return to_dense(*paths, **chosen, prove="no-proof" not in options)

    def said(found: Any) -> str:
        if "expert" in options:
            return f"dense, expert {options['expert']}"
        return f"dense, {options.get('merge', 'average')} of {', '.join(found.experts)}"

    return _done(edit, said, "logits equal the mixture's, forced to that expert,")


def fold(arguments: list[str]) -> int:
    paths, options = parsed(arguments)
    if len(paths) != 2 or not options.keys() <= {"no-proof"}:
        return usage("fold", arguments, FOLD)

    def edit() -> Any:
        import upcycle.folding

        return upcycle.folding.fold(*paths, prove="no-proof" not in options)

    return _done(edit, lambda found: f"soft merging of {', '.join(found.experts)}", "logits equal the mixture's")


def parsed(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """What stands alone, and the options: --no-proof, and --name=NAME and the like; others keep an empty name."""
    options = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            options[name if bool(equals) != (name == "no-proof") else ""] = value
    return [argument for argument in arguments if not argument.startswith("--")], options


def usage(word: str, arguments: list[str], expected: str) -> int:
    got = " ".join(arguments) or "nothing"
    print(f"upcycle: {word}: got {got}, expected {expected}", file=sys.stderr)
    return 2


def _done(edit: Callable[[], Any], said: Callable[[Any], str], proved: str) -> int:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        found = edit()
    except (ValueError, OSError) as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    equal = "" if found.difference is None else f"; {proved} within {found.difference:.1e} of the largest"
    print(f"{found.path}: {said(found)}{equal}")
    for note in found.notes:
        print(f"note: {note}")
    return 0
