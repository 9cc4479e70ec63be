"""The picture shows every run that has figures, and marks the front."""

import pytest

from slimrank.frontier import (
    FrontierReport,
    FrontierRun,
    TextFigure,
    draw_frontier,
    frontier_svg,
    write_plot,
)
from slimrank.frontier.result import with_front

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
POINTS = (
    ("dense", "dense", 10_000_000, 5.0),
    ("int8", "int8", 6_000_000, 5.5),
    ("a", "svd", 8_000_000, 40.0),
    ("b", "svd", 5_000_000, 90.0),
    ("c", "kfac-svd", 5_000_000, 30.0),
)


@pytest.fixture
def report():
    runs = [
        FrontierRun(
            name=name,
            recipe={},
            keep=0.5,
            layout="plain",
            method=method,
            allocation="uniform",
            refine="off",
            bytes=size,
            perplexity={"wiki $1": TextFigure(value=value, tokens=9, in_domain=True)},
            is_dense=method in ("dense", "int8"),
        )
        for name, method, size, value in POINTS
    ]
    runs.append(runs[-1].model_copy(update={"name": "bad", "error": "x", "perplexity": {}}))
    return FrontierReport(
        model="tiny",
        environment={},
        date="",
        settings={"texts": {"wiki $1": {"in_domain": True}}},
        runs=with_front(runs, "wiki $1"),
    )


def test_front(report):
    assert [run.name for run in report.runs if run.pareto] == ["dense", "int8", "c"]


def test_points_and_front(report):
    (axes,) = draw_frontier(report).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["dense", "int8", "svd", "kfac-svd", "Pareto front", "of low rank"]
    assert lines["svd"].get_xydata().tolist() == [[8.0, 40.0], [5.0, 90.0]]
    assert lines["Pareto front"].get_xydata().tolist() == [[5.0, 30.0], [6.0, 5.5], [10.0, 5.0]]
    assert lines["of low rank"].get_xydata().tolist() == [[5.0, 30.0]]
    assert axes.get_yscale() == "log"
    assert axes.get_title().endswith("(in domain)")


def test_models_with_int8_factors_are_hollow(report):
    run = report.runs[3].model_copy(update={"name": "b, int8", "bytes": 3, "int8_factors": True})
    (axes,) = draw_frontier(report.model_copy(update={"runs": (*report.runs, run)})).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines)[2:5] == ["svd", "svd, int8", "kfac-svd"]
    assert len(lines["svd"].get_xdata()) == 2
    assert lines["svd, int8"].get_xydata().tolist() == [[3e-6, 90.0]]
    assert (lines["svd"].get_fillstyle(), lines["svd, int8"].get_fillstyle()) == ("full", "none")
    assert lines["svd"].get_color() == lines["svd, int8"].get_color()


def test_the_same_report_gives_the_same_bytes(report, tmp_path):
    picture = frontier_svg(report)
    assert b"<svg" in picture
    assert picture == frontier_svg(report)
    path = write_plot(report, tmp_path)
    assert path == tmp_path / "frontier.svg"
    assert path.read_bytes() == picture
    assert write_plot(report, tmp_path) == path
