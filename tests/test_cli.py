"""The command line, and the picture of a layout."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from rmt_kernels import SegmentLayout, __version__, _build, cli
from rmt_kernels.backends import cpu, triton


def test_info_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert __version__ in said
    for name in ("cpu", "cuda", "triton", "stock", "reference"):
        assert f"\nbackend {name} " in said


def test_info_says_why_the_compiled_module_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "why_missing", "it was never built")
    assert cli.main(["info"]) == 0
    assert "not usable: it was never built" in capsys.readouterr().out


_MODULE = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
_FACTS = {
    "module": _MODULE,
    "architectures": ["80", "90a"],
    "elements": ["BF16", "F16"],
    "widths": [64, 128],
    "compiler": "nvcc 13.0.88",
}
_BUILT = "built: BF16 and F16 at head_dim 64, 128 for sm_80, sm_90a, by nvcc 13.0.88"


@pytest.mark.parametrize(
    ("record", "file", "loads", "words"),
    [
        (None, False, True, "not usable: the CUDA extension was not built: nothing was compiled here; build it with: "),
        (
            {"why_missing": "no nvcc: it is nowhere"},
            False,
            True,
            "not usable: the CUDA extension was not built: no nvcc: it is nowhere; build it with: RMT_",
        ),
        (_FACTS, False, True, f"not usable: the CUDA extension was not built: {_MODULE}, of which "),
        (
            {**_FACTS, "module": "_cuda.cpython-27.so"},
            True,
            True,
            "not usable: the CUDA extension was not built: there is only _cuda.cpython-27.so, which is",
        ),
        (_FACTS, True, False, "not usable: the CUDA extension does not load: "),
        (_FACTS, True, True, f"usable on a CUDA GPU, and torch sees none here, {_BUILT}"),
    ],
)
def test_info_tells_of_the_cuda_extension(
    record: dict[str, object] | None,
    file: bool,
    loads: bool,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_build, "_RECORD", tmp_path / "_built.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "rmt_kernels._cuda", ModuleType("_cuda") if loads else None)
    if record is not None:
        (tmp_path / "_built.json").write_text(json.dumps({"cuda": record}))
    if file:
        (tmp_path / str((record or {})["module"])).touch()
    assert cli.main(["info"]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("backend cuda")]
    assert said.startswith(f"backend cuda       {words}")
    assert (_BUILT in said) == (record == _FACTS and file)


def test_info_tells_of_triton_and_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton, "why_missing", "it was never installed")
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "gpu                none that torch sees\n" in said
    assert "backend triton     not usable: it was never installed\n" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Chip {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8 + index, 0))
    monkeypatch.setattr(triton, "why_missing", "")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name}-3.6")
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert (
        "gpu 0              Chip 0, compute capability 8.0\ngpu 1              Chip 1, compute capability 9.0\n" in said
    )
    assert "backend triton     usable, triton triton-3.6\n" in said


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
