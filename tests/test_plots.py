"""The plots are written, are pictures of a sensible size, and show the figures of the report."""

import builtins
import struct
from pathlib import Path

import pytest
import torch

from slimrank.analysis import analyze
from slimrank.errors import SlimrankError
from slimrank.plots import draw_energy, draw_heat_map, draw_importance, draw_spectra, write_plots
from tiny import profiles

NAMES = ["heat_map.png", "spectra.png", "energy_rank.png", "importance.png"]


def profile(blocks, after_norm=0.4):
    """Two types in every block; in the last, experts of unequal sizes, one without any output."""
    spectra = {}
    for block in range(blocks):
        spectra[f"{block}.attn.q"] = [2.0 ** -(i / (block + 1)) for i in range(12)]
        spectra[f"{block}.mlp.up"] = [1.0 / (i + 1) for i in range(8)]
    last = blocks - 1
    spectra[f"{last}.mlp.experts.0.down"] = profiles.flat(3, size=6)
    spectra[f"{last}.mlp.experts.1.down"] = profiles.flat(6, size=9)
    spectra[f"{last}.mlp.experts.2.down"] = profiles.flat(0, size=6)
    importance = [0.9 / (block + 1) for block in range(blocks)]
    return profiles.build(spectra, importance, after_norm)


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.mark.parametrize("blocks", [1, 2, 5, 40])
def test_four_pictures(blocks, tmp_path):
    content = profile(blocks)
    names = write_plots(analyze(content), content.spectra, tmp_path)
    assert names == NAMES
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES)
    for name in NAMES:
        width, height = size(tmp_path / name)
        assert 300 < width < 3000
        assert 250 < height < 3000


def test_heat_map_shows_the_means_and_leaves_gaps():
    report = analyze(profile(3))
    axes, bar = draw_heat_map(report).axes
    shown = axes.images[0].get_array()
    assert shown.shape == (3, 3)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "attn.q",
        "mlp.up",
        "mlp.experts.*.down",
    ]
    expected = [x.normalized_effective_rank for x in report.linears if x.kind == "attn.q"]
    assert shown[0].tolist() == pytest.approx(expected)
    assert shown[2].mask.tolist() == [True, True, False]
    assert shown[2, 2] == pytest.approx((3 / 6 + 6 / 9) / 2)
    assert "min(in, out)" in bar.get_ylabel()
    assert axes.get_xticks().tolist() == [0, 1, 2]


def test_one_curve_a_block_normalised_on_a_log_scale():
    content = profile(3)
    figure = draw_spectra(analyze(content), content.spectra)
    first, _, experts = figure.axes[:3]
    assert (first.get_title(), first.get_yscale()) == ("attn.q", "log")
    assert len(first.lines) == 3
    assert len({line.get_color() for line in first.lines}) == 3
    x, y = first.lines[0].get_data()
    assert y.tolist() == pytest.approx([2.0**-i for i in range(12)])
    assert (float(x[0]), float(x[-1])) == (pytest.approx(1 / 12), 1)
    assert len(experts.lines) == 1
    assert len(experts.lines[0].get_ydata()) == 9  # the longer of the two


def test_zeros_of_a_spectrum_are_left_out_of_the_log_scale():
    content = profiles.build({"0.q": profiles.flat(2)}, [1.0])
    line = draw_spectra(analyze(content), content.spectra).axes[0].lines[0]
    assert torch.as_tensor(line.get_ydata()).isnan().tolist() == [False, False, True, True]


def test_energy_runs_from_the_first_value_to_all():
    content = profiles.build({f"{i}.q": profiles.flat(i + 2) for i in range(3)}, [0.3, 0.2, 0.1])
    axes = draw_energy(analyze(content), content.spectra).axes[0]
    median = axes.lines[0]
    assert median.get_xdata().tolist() == [0.25, 0.5, 0.75, 1]
    assert median.get_ydata().tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1])  # the middle one
    corners = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert {0.25, 0.5, 0.75} <= {round(float(y), 12) for y in corners}  # two and four equal values
    assert axes.get_xscale() == "log"
    assert axes.figure.get_supxlabel() == "rank / min(in, out)"


def test_titles_say_r_and_p_or_why_not():
    content = profile(5)
    report = analyze(content)
    by_block, mean, query, *_, experts, _bar = draw_importance(report).axes
    found = report.kinds[0].correlations.all_blocks.pearson
    assert query.get_title() == f"attn.q\nr = {found.value:+.2f}, p = {found.p_value:.2g}"
    assert mean.get_title().startswith("mean over module types\nr = ")
    assert experts.get_title() == "mlp.experts.*.down\nno r: 1 block, and 3 are needed"
    points = query.collections[0].get_offsets()
    assert points[:, 0].tolist() == pytest.approx(list(report.importance))
    assert by_block.lines[0].get_ydata().tolist() == list(report.importance)
    assert by_block.lines[1].get_data() == ([4], [0.4])
    assert len(draw_importance(analyze(profile(5, None))).axes[0].lines) == 1


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch, tmp_path):
    plain = builtins.__import__

    def refuse(name, *rest, **others):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *rest, **others)

    content = profile(3)
    report = analyze(content)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SlimrankError, match=r"pip install 'slimrank\[analysis\]'"):
        write_plots(report, content.spectra, tmp_path)
    assert list(tmp_path.iterdir()) == []
