from __future__ import annotations

import json
from pathlib import Path

import pytest

from vicinal.measure import readme
from vicinal.measure.report import Entry, Report, Row

ROOT = Path(__file__).parents[2]
MODELS = {
    "created": "2030-01-02T03:04:05+00:00",
    "machine": {"cpu": "a processor", "threads": 2, "torch": "2.13.0"},
    "rows": [
        {
            "kind": "inference",
            "batch": 8,
            "median_ms": {"swin_tiny": 50.0, "nat_tiny": 60.0, "timm swin_tiny": 75.0},
            "swin_tiny_faster_than": {"timm swin_tiny": 1.5},
            "per_multiply_add_vs_our_swin": {"nat_tiny": 0.8},
        }
    ],
    "shares": {"swin_tiny": {"1": {"linear layers": 0.75, "the rest": 0.25}}},
}


def test_the_readme_shows_the_results_that_lie_in_the_repository():
    assert readme.is_current(ROOT), "README.md is out of date: python -m vicinal.measure readme"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small repository with results and a README that shows them."""
    entries = (
        Entry("tiled", True, median_ms=2.0, quartiles_ms=(1.9, 2.1), gflops=50.0, share_of_gemm=0.25),
        Entry("halo_bmm", False, "4x4", median_ms=3.0),
        Entry("halo_sdpa", False, "8x8", median_ms=5.0),
        Entry("sdpa_mask", False, median_ms=40.0),
        Entry("flex", False, reason="not run: no compiler"),
    )
    speedups = {"tiled": {"halo_bmm": 1.5, "halo_sdpa": 2.5, "sdpa_mask": 20.0}}
    row = Row("nat-56x56", "1x56x56 H2 D32, Near(7)", "float32", "forward", 39337984, entries, speedups)
    report = Report(
        created="2030-01-02T03:04:05+00:00",
        machine={"cpu": "a processor", "threads": 2, "torch": "2.13.0"},
        settings={"backends": ["tiled"]},
        peaks={"gemm": {"float32": {"gflops": 200.0, "by": "oneDNN"}}},
        rows=[row],
    )
    report.save(tmp_path / readme.RESULTS)
    (tmp_path / readme.MODEL_RESULTS).write_text(json.dumps(MODELS))
    (tmp_path / "README.md").write_text(f"# Before\n\n{readme.generated(tmp_path)}\n\nafter\n")
    return tmp_path


def test_the_table_shows_time_share_and_ratios(root: Path):
    text = readme.generated(root)
    assert "| nat-56x56 (1x56x56 H2 D32, Near(7)) | 2.00 | 25% | 20x | 1.50x |" in text
    assert "FlexAttention" not in text  # it was not run
    assert "a processor, 2 threads, torch 2.13.0, float32 GEMM 200 GFLOP/s, 2030-01-02" in text
    assert "| inference, batch 8 | 50.0 | 1.50x | 60.0 (0.80) |" in text
    assert "at batch 1 linear layers 75%, the rest 25%" in text


def test_an_out_of_date_readme_is_found_and_repaired(root: Path):
    assert readme.is_current(root)
    path = root / "README.md"
    path.write_text(path.read_text().replace("2.00", "1.00"))
    assert not readme.is_current(root)
    assert readme.rewrite(root)
    assert readme.is_current(root)
    assert path.read_text().startswith("# Before\n")
    assert path.read_text().endswith("\n\nafter\n")
    assert not readme.rewrite(root)


def test_a_readme_without_markers_is_an_error(root: Path):
    (root / "README.md").write_text("# Nothing\n")
    with pytest.raises(ValueError, match="benchmark:start"):
        readme.is_current(root)
