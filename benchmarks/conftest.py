"""Options and result file of the pytest-benchmark suite: ``pytest benchmarks`` (few cases), ``--full`` (all)."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.bench_attention import parameters
from benchmarks.environment import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every case, dtype and contestant, not a selection")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contestant" in metafunc.fixturenames:
        names, values = parameters(metafunc.config.getoption("--full"))
        metafunc.parametrize(names, values)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["environment"] = environment(["-m", "pytest", *config.invocation_params.args])
