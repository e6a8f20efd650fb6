"""Settings of the whole suite: no network, one thread, the same random numbers whichever tests run."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import zlib

import numpy as np
import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# The models are tiny: a second thread costs more than it gives, and with xdist every worker would bring its own.
torch.set_num_threads(1)

NO_SKIP = os.environ.get("UPCYCLE_NO_SKIP") == "1"


@pytest.fixture(autouse=True)
def fixed_seed(request):
    """A seed of each test's own, so that a test's numbers don't depend on which tests ran before it."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available() and "UPCYCLE_GPU_TESTS_ON" not in os.environ:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _fail_if_skipped(report, what: str) -> None:
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"UPCYCLE_NO_SKIP=1 and {what} was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if not item.get_closest_marker("gpu"):
        _fail_if_skipped(report, item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _fail_if_skipped(report, collector.nodeid)
    return report
