"""Heat maps have a cell for each linear in its place, and tables sum up what the report holds."""

from xml.etree.ElementTree import fromstring

from slimrank.pages import linears
from slimrank.pages.svg import viridis


def cells(chart):
    """Fill and title of each cell."""
    rects = fromstring(chart.svg).iter("rect")
    return [(r.get("fill"), r[0].text) for r in rects if len(r) and r[0].tag == "title"]


def test_each_linear_has_its_cell(make_report):
    chart = linears.map_of_kept(make_report().linears)
    fills = {title.splitlines()[0]: fill for fill, title in cells(chart)}
    assert len(fills) == 4
    assert fills["model.layers.1.up_proj"] == "url(#dense)"
    fill = fills["model.layers.0.up_proj"]
    assert fill == viridis((0.8 + 0.04) / 1.08)
    assert fill != fills["model.layers.1.q_proj"]


def test_a_cell_says_all_of_its_linear(make_linear):
    chart = linears.map_of_kept([make_linear("h.0.fc", 3, effective_rank=7.25)])
    ((_, title),) = cells(chart)
    assert title == "h.0.fc\nrank 3\nkept 60.0 %\nloss 10.0 %\neffective rank 7.25"


def test_experts_share_a_cell(make_linear):
    experts = [make_linear(f"model.layers.0.experts.{i}.up", i or None) for i in range(4)]
    ((_, title),) = cells(linears.map_of_kept(experts))
    head, rank, kept, _ = title.splitlines()
    assert head == "4 linears: model.layers.0.experts.0.up …"
    assert (rank, kept) == ("rank 1–3, 1 dense", "kept 55.0 %")


def test_linears_outside_of_blocks_are_in_the_table_only(make_linear):
    both = [make_linear("model.layers.0.q", 1), make_linear("lm_head", 2)]
    assert len(cells(linears.map_of_kept(both))) == 1
    assert [row[0] for row in linears.table_of_kinds(both).rows] == ["q", "lm_head"]


def test_the_table_sums_up(make_linear):
    losses = {1: 0.3, 2: 0.1}
    own = [make_linear(f"layers.{i}.q", i, measured_loss=loss) for i, loss in losses.items()]
    own.append(make_linear("layers.3.q", None))
    (row,) = linears.table_of_kinds(own).rows
    assert row == ("q", "3", "1–2, 1 dense", "300", "160", "53.3 %", "20.0 %", "30.0 %")


def test_maps_of_losses_and_of_effective_ranks(make_linear):
    own = [
        make_linear("layers.0.q", 1, measured_loss=0.01, effective_rank=10.0),
        make_linear("layers.1.q", 1, measured_loss=0.1, effective_rank=100.0),
        make_linear("layers.2.q", None, effective_rank=None),
    ]
    for draw in (linears.map_of_losses, linears.map_of_effective_ranks):
        fills = [fill for fill, _ in cells(draw(own))]
        assert fills[2] == "url(#dense)"
        assert len(set(fills)) == 3
