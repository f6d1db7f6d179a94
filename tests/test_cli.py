"""The command line, and the picture of a layout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rmt_kernels import SegmentLayout, __version__, cli
from rmt_kernels.backends import cpu


def test_info_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert __version__ in said
    assert "backend cpu" in said


def test_info_says_why_the_compiled_module_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "why_missing", "it was never built")
    assert cli.main(["info"]) == 0
    assert "not usable: it was never built" in capsys.readouterr().out


def test_demo_draws_and_checks_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    said = capsys.readouterr().out
    assert said.count("largest error against float64") == len(cli._DEMO)
    assert "all right" in said


def test_demo_fails_where_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "segment_attention", lambda query, key, value, layout: query * 0)
    assert cli.main(["demo"]) == 1


def test_bench_without_a_checkout_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_CHECKOUT", tmp_path)
    assert cli.main(["bench"]) == 2
    assert "clone the repository" in capsys.readouterr().err


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["info", "--fast"])


def test_plot_names_the_regions_on_both_axes() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    layout = SegmentLayout.rmt_decoder(24, 4, cache=6)
    ax = layout.plot()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["CACHE 6", "READ 4", "TOKENS 24", "WRITE 4"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["READ 4", "TOKENS 24", "WRITE 4"]
    drawn = torch.as_tensor(np.asarray(ax.get_images()[0].get_array()))
    assert torch.equal(drawn > 0, layout.dense_mask())
    assert ax.get_title() == "rmt_decoder"


def test_plot_of_the_last_rows_and_of_nothing() -> None:
    pytest.importorskip("matplotlib")
    ax = SegmentLayout.rmt_decoder(24, 4).last(10).plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["TOKENS 6", "WRITE 4"]
    assert not SegmentLayout().plot().get_images()


def test_the_package_imports_without_matplotlib() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from rmt_kernels import SegmentLayout\n"
        "try:\n    SegmentLayout.rmt_decoder(4, 1).plot()\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(cli.__file__).parent.parent, capture_output=True, text=True, check=True
    )
    assert "pip install matplotlib" in done.stdout
