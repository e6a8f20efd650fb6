"""Benchmarks, a file a group: each has a table BENCHMARKS of functions `Bench -> rows`. `python -m evals.speed` runs them."""
