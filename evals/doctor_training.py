"""What metrics.jsonl shows of a mixture's training: load, trends, entropies, logits, gradients, losses.

Every check is a function of the case alone. Shapes: N rows, L layers, E experts, K experts a token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from evals.doctor_case import LAST, RESTORE, Case, Finding, now
from evals.evidence import METRICS
from upcycle.durable import reading
from upcycle.kinds import FACTS
from upcycle.routing import DEAD_SHARE

UNEVEN, COLLAPSED = (
    0.5,
    0.25,
)  # of evenness: nearer to all tokens in the same K experts than to uniform; three quarters there
BLOCKS, STUDENT = (
    8,
    2.447,
)  # blocks a trend is fitted through, and the 97.5 % quantile of Student's t with BLOCKS - 2 degrees
UNIFORM_GATES = (
    0.99  # entropy / log E; log E - H = ½ cv²: with 4 experts gates then stray from 1/E by 17 % on average, and a
)
# fresh router of std 0.02 began at 0.984 in the demo
ONE_GATE = 0.1  # entropy / log E; with 4 experts exp(H) = 1.15 of them take part
SATURATED = 24 * math.log(
    2
)  # 16.6: one logit so far above the others has a softmax of exactly 1 in fp32 (2^-24 is half its ulp)
OVERFLOWING = 126 * math.log(2)  # 87.3: exp(-x) leaves fp32's normal range, and exp(x) is at a factor of 4 from its end
SPIKE = 10.0  # gradient norm over the median of the WINDOW steps before; the demo's presets stay below 3
WINDOW = 16
LOST_NATS = 0.5  # per token: 1.65 times the perplexity; single batches of the demo differ by less than 0.1
PATIENCE_SECONDS, PATIENCE_STEPS = 300.0, 10  # a snapshot of a large model takes minutes


def progress(case: Case) -> Finding:
    """How far the training is; whether it still runs, or why it stopped."""
    if case.failed:
        return Finding(
            "progress", "bad", f"failed after step {case.step}: {case.failed}", case.step, "no error",
            "the same command fails again at the same step unless the cause is gone: change what the error names, such as the "
            "learning rate, which makes it another stage",
        )  # fmt: skip
    if not case.rows:
        return Finding(
            "progress", "look", "metrics.jsonl has no rows: how it was trained is not known", 0, "at least 1 row",
            "train through upcycle, which writes a row a step; or keep metrics.jsonl beside the weights",
        )  # fmt: skip
    last, steps = case.rows[-1], case.train.steps if case.train else None
    with reading(case.directory / METRICS, RESTORE):
        done = f"step {case.step} of {steps or 'an unknown number'}, lr {last['lr']:.1e}, loss {last['loss']:.3f}"
        tokens = last["tokens"] / last["step"]
    if case.state == "trained":
        whole = steps is None or case.step == steps
        do = "" if whole else "metrics.jsonl is of another training, or was cut: restore it, or train again"
        return Finding("progress", "ok" if whole else "look", done, case.step, f"{steps or '?'} steps", do)
    rate = last.get("tokens_per_second", 0)
    seconds = tokens / rate if rate else 0.0
    patience = max(PATIENCE_SECONDS, PATIENCE_STEPS * seconds)
    said = f"{done}; last step {case.idle_seconds:.0f} s ago, a step takes {seconds:.1f} s"
    if case.idle_seconds <= patience:
        return Finding("progress", "ok", f"running: {said}", case.idle_seconds, f"at most {patience:.0f} s")
    return Finding(
        "progress", "look", f"stopped: {said}", case.idle_seconds, f"at most {patience:.0f} s",
        "start the same command again: it goes on from its newest snapshot, bit for bit",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- load


class Load(NamedTuple):
    """The shares of the experts of one sublayer: (N, L, E); its layers' numbers; K of each layer; its experts' names."""

    shares_NLE: np.ndarray
    layers: list[int]
    taken_L: list[int]
    names: list[str]

    def evenness(self, shares_LE: np.ndarray) -> np.ndarray:
        """(L,): 0 all tokens have the same K experts, 1 all experts have as many; NaN where a token has every expert.

        (exp(H) - K) / (E - K),   H the entropy of the shares
        """
        entropy = -(shares_LE * np.log(np.clip(shares_LE, 1e-20, None))).sum(-1)
        K, E = np.array(self.taken_L), shares_LE.shape[-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(K < E, (np.exp(entropy) - K) / (E - K), np.nan)


def load_of(case: Case, part: str) -> Load | None:
    """Of "ffn" or "attention"; None where nothing is known or nothing is decided."""
    shares = case.series("load" if part == "ffn" else "attention_load")
    if not shares.size or (case.config and part not in case.config.parts):
        return None
    if case.config is None:
        L, E = shares.shape[1:]
        return Load(shares, list(range(L)), [1] * L, [f"expert {e}" for e in range(E)])
    rules = [case.config.rule(part, layer) for layer in case.config.routed]
    if FACTS[rules[-1].kind].weightless:
        return None
    names = case.config.names_of(part)
    taken = [len(names) if FACTS[rule.kind].every else rule.top_k for rule in rules]
    return Load(shares, case.config.routed, taken, names) if min(taken) < len(names) else None


def collapse(case: Case, part: str) -> Finding | None:
    """Is a layer's router near a constant, so that the layer is a dense one?"""
    if (load := load_of(case, part)) is None:
        return None
    shares_LE = now(load.shares_NLE)
    even_L = load.evenness(shares_LE)
    worst = int(np.nanargmin(even_L))
    expert = int(shares_LE[worst].argmax())
    said = f"layer {load.layers[worst]}: {load.names[expert]} has {shares_LE[worst, expert]:.0%} of the places"
    if uneven := [load.layers[i] for i in np.flatnonzero(even_L < UNEVEN) if i != worst]:
        said += f"; uneven too: {', '.join(f'layer {layer}' for layer in uneven)}"
    return _graded(
        f"{part} collapse", float(even_L[worst]), UNEVEN, COLLAPSED, f"evenness {even_L[worst]:.2f} in {said}",
        f"at least {UNEVEN} (bad below {COLLAPSED}; 1 is uniform)", balance_advice(case, part),
    )  # fmt: skip


def _graded(check: str, figure: float, look: float, bad: float, said: str, threshold: str, do: str) -> Finding:
    """Large is good."""
    verdict = "bad" if figure < bad else "look" if figure < look else "ok"
    return Finding(check, verdict, said, figure, threshold, "" if verdict == "ok" else do)


def dead(case: Case, part: str) -> Finding | None:
    """Experts that hardly any token takes, in layers that are not called collapsed for it."""
    if (load := load_of(case, part)) is None:
        return None
    shares_LE = now(load.shares_NLE)
    relative_LE = shares_LE * shares_LE.shape[1]
    whole = ~(load.evenness(shares_LE) < COLLAPSED)
    if not whole.any():
        return None
    found = [(int(i), int(e)) for i, e in np.argwhere(relative_LE < DEAD_SHARE) if whole[i]]
    least = float(relative_LE[whole].min())
    threshold = f"at least {DEAD_SHARE} of the uniform load"
    if not found:
        return Finding(f"{part} dead experts", "ok", f"least load {least:.2f} of uniform", least, threshold)
    named = ", ".join(f"{load.names[e]} in layer {load.layers[i]} ({relative_LE[i, e]:.2f})" for i, e in found[:5])
    named += f" and {len(found) - 5} more" if len(found) > 5 else ""
    return Finding(f"{part} dead experts", "bad", f"dead: {named}", least, threshold, balance_advice(case, part))


def balance_advice(case: Case, part: str) -> str:
    """The setting that spreads the load, given what is on already."""
    if case.config is None:
        return "raise router.losses.balance_coefficient, or lower the learning rate"
    losses, rule = case.config.losses(part), case.config.rule(part, case.config.routed[-1])
    name = case.router_setting(part, "losses.balance")
    biased = case.router_setting(part, "bias_rate")
    if not rule.trained:
        return f"{case.router_setting(part, 'trained')}=true: this router is random, and stays as it was drawn"
    if losses["balance"] == "none" or not losses["balance_coefficient"]:
        kind = "switch" if rule.top_k == 1 else "btx"
        first = f"{name}={kind} {name}_coefficient=0.01: no loss holds the load even"
        return first if rule.bias_rate or not FACTS[rule.kind].selects else f"{first}; or {biased}=0.001"
    raised = f"{name}_coefficient={10 * losses['balance_coefficient']:g} (is {losses['balance_coefficient']:g})"
    lower = case.scaled("lr", 0.5)
    return f"{raised}; or {lower}; or {biased}=0.001" if FACTS[rule.kind].selects else f"{raised}; or {lower}"


# -------------------------------------------------------------------------------------------------------------- trends


class Trend(NamedTuple):
    """Change per step, and the 95 % interval of it."""

    slope: float
    low: float
    high: float


def trend(steps_N: np.ndarray, values_N: np.ndarray) -> Trend | None:
    """A line through the means of BLOCKS blocks of the last half of the rows; None where there are less than two rows a block.

    Neighbouring steps are alike, so the spread is that of blocks about the line, not that of steps.
    """
    half = len(values_N) // 2
    if half < 2 * BLOCKS:
        return None
    x = np.array([block.mean() for block in np.array_split(steps_N[half:], BLOCKS)])
    y = np.array([block.mean() for block in np.array_split(values_N[half:], BLOCKS)])
    centred = x - x.mean()
    slope = (centred * y).sum() / (centred**2).sum()
    rest = y - y.mean() - slope * centred
    spread = STUDENT * math.sqrt((rest**2).sum() / (BLOCKS - 2) / (centred**2).sum())
    return Trend(float(slope), float(slope - spread), float(slope + spread))


def steps_ahead(case: Case) -> int:
    """How far a trend is drawn on: to the end of the training, or for as long again as it was fitted over."""
    left = case.train.steps - case.step if case.train and case.state == "training" else 0
    return left or case.step // 2


def load_trend(case: Case, part: str) -> Finding | None:
    """Is the load getting less even, so fast that a layer is uneven before the training ends?"""
    if (load := load_of(case, part)) is None:
        return None
    even_NL = np.stack([load.evenness(shares_LE) for shares_LE in load.shares_NLE])
    ahead, steps = steps_ahead(case), case.series("step")
    found = [
        (i, line)
        for i in range(even_NL.shape[1])
        if (line := trend(steps, even_NL[:, i])) and not math.isnan(line.slope)
    ]
    if not found:
        return None
    at, line = min(found, key=lambda one: now(even_NL)[one[0]] + one[1].slope * ahead)
    current = float(now(even_NL)[at])
    then = min(1.0, max(0.0, current + line.slope * ahead))  # a line goes on beyond what evenness can be
    per = f"{1000 * line.slope:+.2f} [{1000 * line.low:+.2f}, {1000 * line.high:+.2f}] in 1000 steps"
    said = f"evenness of layer {load.layers[at]} is {current:.2f}, {per}; {then:.2f} after {ahead} more"
    falling = line.high < 0 and then < UNEVEN <= current
    return Finding(
        f"{part} load trend", "look" if falling else "ok", said, 1000 * line.slope,
        f"at least {UNEVEN} then", balance_advice(case, part) if falling else "",
    )  # fmt: skip


def soft_gates(case: Case, part: str) -> Finding | None:
    """Of routers that give a token every expert: do their gates tell experts apart, or leave but one?"""
    if case.config is None or part not in case.config.parts:
        return None
    rule, E = case.config.rule(part, case.config.routed[-1]), len(case.config.names_of(part))
    entropy = case.series(f"{part}_entropy")
    if not FACTS[rule.kind].every or FACTS[rule.kind].weightless or len(entropy) < LAST:
        return None
    share = float(now(entropy)) / math.log(E)
    said = f"entropy {share:.2f} of log {E}; {math.exp(share * math.log(E)):.1f} of {E} experts take part"
    threshold = f"{ONE_GATE} to {UNIFORM_GATES} of log E"
    if share > UNIFORM_GATES:
        do = f"{case.faster('router')}; else {case.router_setting(part, 'kind')}=uniform is the same without a router"
        return Finding(f"{part} soft gates", "look", f"nearly uniform: {said}", share, threshold, do)
    if share < ONE_GATE:
        do = f"{case.router_setting(part, 'losses.entropy_coefficient')}=-0.01 spreads them; else "
        do += f"{case.router_setting(part, 'kind')}=top_k, with top_k=1 and gate_order=softmax_topk, does the same"
        return Finding(f"{part} soft gates", "look", f"nearly one expert: {said}", share, threshold, do)
    return Finding(f"{part} soft gates", "ok", said, share, threshold)


# ------------------------------------------------------------------------------------------------------------- numbers


def logits(case: Case, part: str) -> Finding | None:
    """Do router logits leave the range in which a softmax has gradients, or tend there?"""
    if case.config and FACTS[case.config.rule(part, case.config.routed[-1]).kind].weightless:
        return None
    series = case.series(f"{part}_logits")
    if not series.size:  # metrics of before have the z-loss only, where it is on
        series = np.sqrt(case.series("z" if part == "ffn" else "attention_z"))
    if not series.size:
        return None
    current, line, ahead = float(now(series)), trend(case.series("step"), series), steps_ahead(case)
    then = current + line.slope * ahead if line and line.low > 0 else current
    said = f"logsumexp {current:.1f} (root mean square; began at {series[0]:.1f})"
    growing = current < SATURATED and then >= OVERFLOWING
    said += f", {then:.0f} after {ahead} more steps" if growing else ""
    coefficient = case.config.losses(part)["z_coefficient"] if case.config else 0.0
    raised = f"{10 * coefficient:g} (is {coefficient:g})" if coefficient else "0.001"
    do = f"{case.router_setting(part, 'losses.z_coefficient')}={raised}; or {case.scaled('lr', 0.5)}"
    found = _graded(
        f"{part} logits", -current, -SATURATED, -OVERFLOWING, said,
        f"at most {SATURATED:.1f} (bad above {OVERFLOWING:.1f})", do,
    )  # fmt: skip
    return Finding(
        found.check, "look" if growing else found.verdict, said, current, found.threshold, do if growing else found.do
    )


def gradient(case: Case) -> Finding | None:
    """Spikes of the gradient's norm, after the first warm-up."""
    rows = case.warm()
    norms = np.array([row["gradient_norm"] for row in rows])
    if len(norms) <= WINDOW:
        return None
    ratios = norms[WINDOW:] / np.array([np.median(norms[i - WINDOW : i]) for i in range(WINDOW, len(norms))]).clip(
        1e-30
    )
    at, worst = rows[WINDOW + int(ratios.argmax())]["step"], float(ratios.max())
    lasting = now(norms) > SPIKE * np.median(norms)
    said = f"norm {now(norms):.2f}, largest step {worst:.1f} times the median of the {WINDOW} before (step {at})"
    do = f"{_slower(case)}; or {case.scaled('optimizer.clip_norm', 0.5)}"
    verdict = "bad" if lasting else "look" if worst > SPIKE else "ok"
    return Finding("gradient", verdict, said, worst, f"at most {SPIKE:g} times", "" if verdict == "ok" else do)


def loss(case: Case) -> Finding | None:
    """Did the loss rise again, or jump?"""
    series, rows = case.series("cross_entropy"), case.warm()
    if not series.size:
        return None
    if not np.isfinite(series).all():
        return Finding("loss", "bad", "cross-entropy is not finite", math.nan, "finite", _slower(case))
    values = np.array([row["cross_entropy"] for row in rows])
    if len(values) <= WINDOW:
        return None
    means = np.convolve(values, np.ones(LAST) / LAST, mode="valid")
    risen = float(means[-1] - means.min())
    jumps = values[WINDOW:] - np.array([np.median(values[i - WINDOW : i]) for i in range(WINDOW, len(values))])
    at, jump = rows[WINDOW + int(jumps.argmax())]["step"], float(jumps.max())
    said = f"cross-entropy {means[-1]:.3f} nats, {risen:.2f} above its lowest; largest jump {jump:+.2f} (step {at})"
    verdict = "bad" if risen > LOST_NATS else "look" if jump > LOST_NATS else "ok"
    figure = risen if verdict == "bad" else jump
    return Finding("loss", verdict, said, figure, f"at most {LOST_NATS} nats", "" if verdict == "ok" else _slower(case))


def _slower(case: Case) -> str:
    return f"{case.scaled('lr', 0.5)}; or {case.scaled('schedule.warmup_steps', 2)}"
