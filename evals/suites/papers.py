"""The papers' tasks under lm-eval's names: {task: examples before each question}; None is the task's own number.

Of the papers' tasks lm-eval 0.4.13 lacks none, but names differ: SIQA is `social_iqa`, MATH `minerva_math` (the prompt of
Minerva, with its four examples), Natural Questions `nq_open`. Prompts are lm-eval's, so figures compare within a run, not
with a paper's table.
"""

from __future__ import annotations

# Branch-Train-MiX, arXiv:2403.07816.
BTX: dict[str, int | None] = {
    "gsm8k": 8,
    "minerva_math": 4,
    "humaneval": 0,
    "mbpp": 3,
    "nq_open": 5,
    "triviaqa": 5,
    "arc_easy": 0,
    "arc_challenge": 0,
    "social_iqa": 0,
    "piqa": 0,
    "winogrande": 0,
    "mmlu": 5,
}
# Branch-Attend-Mix, arXiv:2408.08274, adds law to the domains.
BAM: dict[str, int | None] = BTX | {"legalbench": None}

PAPERS = {"btx": BTX, "bam": BAM}
