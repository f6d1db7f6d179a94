"""What every test shares: the ``--slow`` option, one thread, fixed seeds, and memory that starts as NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # read when the kernels are defined
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["RMT_KERNELS_EMULATE"] = "1"

from tests.interpreter import hasten
from tests.parallel_worker import Ranks
from tests.suite import nan_filled_memory

hasten()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same seed for every test, and the number of threads as it was before it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Times and failures should not depend on the machine's number of cores; thread tests set their own."""
    torch.set_num_threads(1)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Memory freshly allocated by PyTorch, here and in C++, holds NaN."""
    with nan_filled_memory():
        yield


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two processes, for the tests of one file."""
    processes = Ranks()
    yield processes
    processes.stop()
