"""`tokens=50M` and `budget=2h`: how long a run is, said once, in tokens or in hours of this machine.

The rule: T tokens after the seed are split in two shares (`shares`), 80 % for the branches, in equal parts, and 20 % for
each mixture; so one mixture and its branches, and the dense continuation on the same tokens, have T. The published run spent
85 % on its branches (BTX, arXiv:2403.07816: 201B + 210B + 42B of 533B tokens); a mixture has to learn its routers
from nothing however short the run is, so it gets a little more here. Where nothing of one kind is trained the other has all.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TOKENS = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kMGBT]?)")
TIME = re.compile(r"(?=.)((?P<hours>\d+(\.\d+)?)h)?((?P<minutes>\d+(\.\d+)?)m)?")
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
SECONDS = {"hours": 3600.0, "minutes": 60.0}
OUTSIDE = ("launch", "track", "plan", "stage", "name", "artifacts", "out")  # no part of what a run's speed depends on
CLOSE, ATTEMPTS = 0.01, 12


def read_tokens(given: Any) -> int:
    """50M, 1.5B, 300k or a whole number. Raises ValueError: anything else, or nothing."""
    found = TOKENS.fullmatch(str(given).strip()) if not isinstance(given, bool) else None
    count = float(found["number"]) * UNITS[found["unit"]] if found else 0.0
    if count < 1 or count != int(count):
        raise ValueError(
            f"tokens={given}: expected a whole number of tokens above 0, such as tokens=50M (k, M, B or G, T), tokens=1.5B or "
            "tokens=50000000"
        )
    return int(count)


def read_seconds(given: Any) -> float:
    """2h, 90m or 1h30m, in seconds. Raises ValueError: anything else, or no time at all."""
    found = TIME.fullmatch(str(given).strip()) if not isinstance(given, bool) else None
    seconds = sum(float(found[unit] or 0) * size for unit, size in SECONDS.items()) if found else 0.0
    if not seconds:
        raise ValueError(f"budget={given}: expected hours and minutes, such as budget=2h, budget=90m or budget=1h30m")
    return seconds


def shared_out(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose branch.tokens and mix.tokens are what `tokens` gives them; as they are where it is null.

    Raises ValueError: `tokens` in a wrong form, shares that are none, nothing to train, a run with tokens of its own.
    """
    raw = dict(raw)
    shares = raw.pop("shares", None)
    of_branches = None if shares is None else _fraction(shares)
    if raw.pop("budget", None) is not None:
        raise ValueError("budget: expected tokens here, which `upcycle budget=...` works out; give tokens=")
    if raw.get("tokens") is None:
        return raw
    raw["tokens"] = total = read_tokens(raw["tokens"])
    of_branches = _fraction(shares) if of_branches is None else of_branches
    branches, mixtures = (_named(raw.get(key)) for key in ("branches", "mixtures"))
    branches = {name: item for name, item in branches.items() if not item.get("path")}
    mixtures = {name: item for name, item in mixtures.items() if _own(item) != 0}
    for where, items in (("branches", branches), ("mixtures", mixtures)):
        for name, item in items.items():
            if (own := _own(item)) is not None:
                raise ValueError(
                    f"{where}.{name}.train.tokens={own} beside tokens={total}, which is shared among all branches and mixtures; "
                    "leave one of them out"
                )
    if not branches and not mixtures:
        raise ValueError(f"tokens={total}: no branch and no mixture is trained, so nothing can have them; leave it out")
    of_branches = 0.0 if not branches else of_branches if mixtures else 1.0
    parts = {"branch": of_branches * total / max(1, len(branches)), "mix": (1 - of_branches) * total}
    for key, trained in (("branch", branches), ("mix", mixtures)):
        if trained:
            raw[key] = dict(raw.get(key) or {}) | {"tokens": max(1, round(parts[key]))}
    return raw


def _named(items: Any) -> dict[str, dict]:
    """Settings by name; what is of another form is refused later, in words."""
    return {name: item for name, item in items.items() if isinstance(item, dict)} if isinstance(items, dict) else {}


def _own(item: Mapping[str, Any]) -> int | None:
    """The tokens that a branch or mixture is given by itself."""
    return (item.get("train") or {}).get("tokens")


def _fraction(shares: Any) -> float:
    """The branches' part of the tokens."""
    found = shares if isinstance(shares, Mapping) else {}
    numbers = [found.get(name) for name in ("branches", "mixture")]
    whole = set(found) == {"branches", "mixture"} and all(isinstance(one, int | float) and one > 0 for one in numbers)
    if not whole or not math.isclose(sum(numbers), 1, abs_tol=1e-6):
        raise ValueError(
            f"shares={shares}: expected two numbers above 0 that sum to 1, branches and mixture, such as "
            "'shares={branches: 0.8, mixture: 0.2}'"
        )
    return numbers[0]


def tokens_within(seconds: float, seconds_of: Callable[[int], float], start: int) -> int:
    """The most tokens (to 1 %) that take no longer than `seconds`.

    seconds_of: of a run of so many tokens after its seed; it rises about linearly, in steps, from what a run takes whatever
    its tokens. start: a number to begin the search with. Raises ValueError: even the shortest run takes longer.
    """
    low, high, low_seconds, high_seconds = start, None, seconds_of(start), 0.0
    while low_seconds > seconds:
        if low == 1:
            raise ValueError(
                f"the shortest run of these settings, one step of everything, takes about {low_seconds:.0f} s here after its seed; "
                "give it more, or drop models"
            )
        high, high_seconds, low = low, low_seconds, low // 2
        low_seconds = seconds_of(low)
    while high is None or high_seconds <= seconds:
        if high is not None:
            low, low_seconds = high, high_seconds
        high = 2 * low
        high_seconds = seconds_of(high)
    for _ in range(ATTEMPTS):
        if high - low <= CLOSE * low:
            break
        share = (seconds - low_seconds) / (high_seconds - low_seconds)
        middle = low + max(1, min(high - low - 1, round((high - low) * min(max(share, 0.1), 0.9))))
        if (found := seconds_of(middle)) <= seconds:
            low, low_seconds = middle, found
        else:
            high, high_seconds = middle, found
    return low


def fingerprint(raw: Mapping[str, Any]) -> str:
    """Of all settings that the tokens of a budget depend on."""
    kept = {name: value for name, value in raw.items() if name not in OUTSIDE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def remembered(raw: Mapping[str, Any], out: Path) -> dict[str, Any] | None:
    """What this very run measured when it began, from its manifest, so that it goes on with the same tokens."""
    try:
        found = json.loads((out / "manifest.json").read_text())["budget"]
        return found if found["settings"] == fingerprint(raw) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
