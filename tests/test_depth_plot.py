"""Errors by depth are gathered as reported, named apart, and drawn where they belong."""

import errno
import math
import struct
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from slimrank.depth_plot import (
    CALIBRATION,
    HELD_OUT,
    UNREFINED,
    draw_depth,
    read_depths,
    write_depth_plot,
)
from slimrank.errors import CheckpointError, SlimrankError
from tiny import depths


@pytest.fixture
def read(tmp_path):
    """Write reports into folders named a, b, … and read them back."""

    def gather(*reports):
        folders = [tmp_path / "abcdefghijklmnop"[i] for i in range(len(reports))]
        return read_depths([depths.write(r, f) for r, f in zip(reports, folders, strict=True)])

    return gather


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def relative(curve):
    return {block: error.relative_error for block, error in curve.items()}


def test_a_run_says_what_it_is(read, tmp_path):
    report = depths.build([0.1, 0.2], [0.3, 0.4], [0.5, 0.6], method="aa-svd", keep=0.6)
    (run,) = read(report).runs
    assert (run.folder, run.model) == (str(tmp_path / "a"), "by hand")
    assert (run.method, run.param_ratio, run.scope, run.refined) == ("aa-svd", 0.6, "targets", True)
    assert run.calibration_fingerprint == "1" * 64
    assert run.blocks == report.blocks
    assert run.label == "aa-svd, keep 0.6, refined"


def test_curves_of_each_text(read):
    refined, plain, unheld = read(
        depths.build([0.1, 0.2], [0.3, 0.4], [0.5, 0.6]),
        depths.build([0.1, 0.2], [0.3, 0.4]),
        depths.build([0.1, 0.2], None, [0.5, 0.6]),
    ).runs
    assert {text: relative(curve) for text, curve in refined.curves().items()} == {
        HELD_OUT: {0: 0.3, 1: 0.4},
        CALIBRATION: {0: 0.1, 1: 0.2},
        UNREFINED: {0: 1.0, 1: 1.2},  # held-out too
    }
    assert next(iter(refined.curves())) == HELD_OUT
    assert list(plain.curves()) == [HELD_OUT, CALIBRATION]
    assert list(unheld.curves()) == [CALIBRATION, UNREFINED]
    assert relative(unheld.curves()[UNREFINED]) == {0: 0.5, 1: 0.6}


def test_a_budget_of_the_whole_model_is_named_so(read):
    report = depths.build([0.1])
    budget = report.recipe.budget.model_copy(update={"scope": "model"})
    recipe = report.recipe.model_copy(update={"budget": budget})
    (run,) = read(report.model_copy(update={"recipe": recipe})).runs
    assert run.label == "svd-llm, keep 0.8 of the model"


def test_equal_labels_get_the_folder_and_others_do_not(tmp_path):
    same, other = depths.build([0.1]), depths.build([0.1], keep=0.9)
    folders = [
        depths.write(same, tmp_path / "one" / "x"),
        depths.write(same, tmp_path / "two" / "x"),
        depths.write(same, tmp_path / "y"),
        depths.write(other, tmp_path / "z"),
    ]
    assert [run.label for run in read_depths(folders).runs] == [
        f"svd-llm, keep 0.8 ({folders[0]})",
        f"svd-llm, keep 0.8 ({folders[1]})",
        "svd-llm, keep 0.8 (y)",
        "svd-llm, keep 0.9",
    ]


def test_the_folder_one_stands_in_has_a_name(tmp_path, monkeypatch):
    depths.write(depths.build([0.1]), tmp_path / "here")
    depths.write(depths.build([0.1]), tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    labels = [run.label for run in read_depths([Path(), Path("../there")]).runs]
    assert labels == ["svd-llm, keep 0.8 (here)", "svd-llm, keep 0.8 (there)"]


def test_a_one_shot_run_is_refused(read):
    message = "b was made in one-shot order and holds no errors by depth; compress with --order"
    with pytest.raises(CheckpointError, match=message):
        read(depths.build([0.1]), depths.build([]))


def test_each_panel_shows_its_figures(read):
    report = read(depths.build([0.1, 0.2], [0.3, 0.4], [0.5, 0.6]), depths.build([0.1, 0.2, 0.3]))
    error, cosine = draw_depth(report).axes
    assert (error.get_yscale(), cosine.get_yscale()) == ("log", "linear")
    assert (error.get_ylabel(), cosine.get_ylabel()) == ("relative error", "cosine distance")
    expected = [
        ("-", "C0", [0, 1], [0.3, 0.4]),
        (":", "C0", [0, 1], [0.1, 0.2]),
        ("--", "C0", [0, 1], [1.0, 1.2]),
        (":", "C1", [0, 1, 2], [0.1, 0.2, 0.3]),
    ]
    for axes, share in ((error, 1), (cosine, 4)):
        shown = [
            (x.get_linestyle(), x.get_color(), list(x.get_xdata()), list(x.get_ydata()))
            for x in axes.lines
        ]
        assert shown == [(*look, blocks, [y / share for y in ys]) for *look, blocks, ys in expected]
        assert axes.get_xticks().tolist() == [0, 1, 2]
    widths = [line.get_linewidth() for line in error.lines]
    assert widths[1] < widths[0]


def test_legends_name_runs_and_the_styles_that_occur(read):
    figure = draw_depth(read(depths.build([0.1], [0.1]), depths.build([0.1], keep=0.5)))
    assert texts(figure.legends[0]) == ["svd-llm, keep 0.8", "svd-llm, keep 0.5"]
    assert texts(figure.axes[1].get_legend()) == [HELD_OUT, CALIBRATION]


def test_no_style_is_named_that_does_not_occur(read):
    figure = draw_depth(read(depths.build([0.1], None, [0.2])))
    assert texts(figure.axes[1].get_legend()) == [CALIBRATION, UNREFINED]


def test_an_error_of_zero_leaves_a_gap_on_the_log_axis_only(read):
    report = read(depths.build([0.0, 0.1, 0.0]))
    error, cosine = draw_depth(report).axes
    assert [math.isnan(y) for y in error.lines[0].get_ydata()] == [True, False, True]
    assert list(cosine.lines[0].get_ydata()) == [0.0, 0.025, 0.0]


def test_no_two_of_many_runs_look_alike(read):
    report = read(*(depths.build([0.1]) for _ in range(12)))
    looks = {(line.get_color(), line.get_marker()) for line in draw_depth(report).axes[0].lines}
    assert len(looks) == 12


@pytest.mark.parametrize("blocks", [1, 3, 40])
@pytest.mark.parametrize("runs", [1, 12])
def test_the_picture(runs, blocks, read, tmp_path):
    report = read(*(depths.build([0.1] * blocks, [0.2] * blocks) for _ in range(runs)))
    out = tmp_path / "deep" / "depth.png"
    write_depth_plot(report, out)
    assert [path.name for path in out.parent.iterdir()] == ["depth.png"]
    head = out.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert 600 < width < 3000
    assert 400 < height < 3000


def test_only_zeros_and_dollar_signs_can_be_drawn(tmp_path):
    folders = [
        depths.write(depths.build([0.0, 0.0]), tmp_path / name) for name in ("$a$", r"$\frac", "$")
    ]
    write_depth_plot(read_depths(folders), tmp_path / "depth.png")
    assert (tmp_path / "depth.png").is_file()


@pytest.mark.parametrize("name", ["depth", "depth.pdf", "depth.png.txt"])
def test_a_name_that_is_no_png_is_refused(name, read, tmp_path):
    with pytest.raises(CheckpointError, match=r"name a file that ends in \.png"):
        write_depth_plot(read(depths.build([0.1])), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_there_stays(read, tmp_path):
    (tmp_path / "depth.png").write_text("mine")
    (tmp_path / "link.png").symlink_to("nowhere")
    report = read(depths.build([0.1]))
    for name in ("depth.png", "link.png"):
        with pytest.raises(CheckpointError, match="exists already; name a file that does not"):
            write_depth_plot(report, tmp_path / name)
    assert (tmp_path / "depth.png").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "depth.png", "link.png"}


def test_a_full_disk_leaves_nothing(read, tmp_path, monkeypatch):
    def full(self, path, **_how):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    report = read(depths.build([0.1]))
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_depth_plot(report, tmp_path / "depth.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_appears_meanwhile_stays(read, tmp_path, monkeypatch):
    out = tmp_path / "depth.png"
    report = read(depths.build([0.1]))
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: out.write_text("theirs"))
    with pytest.raises(CheckpointError, match="appeared meanwhile"):
        write_depth_plot(report, out)
    assert out.read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "depth.png"}


def test_without_matplotlib_one_line_says_what_to_install(read, tmp_path, monkeypatch):
    report = read(depths.build([0.1]))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SlimrankError, match=r"pip install 'slimrank\[analysis\]'"):
        write_depth_plot(report, tmp_path / "deep" / "depth.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
