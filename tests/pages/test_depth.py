"""Curves of each text, courses of refinements, and a row for each block."""

from xml.etree.ElementTree import fromstring

from slimrank.pages.depth import charts_of_errors, charts_of_refinement, table_of_blocks
from slimrank.report import RefinementEpoch, RefinementReport
from tiny import depths


def labels(chart):
    return [entry.label for entry in chart.legend]


def titles(chart):
    return [x.text for x in fromstring(chart.svg).iter("title")][1:]


def refined(blocks, kept):
    """Give blocks a refinement of two epochs."""
    epochs = (
        RefinementEpoch(loss=0.4, held_out_loss=0.6, seconds=1.0),
        RefinementEpoch(loss=0.2, held_out_loss=0.8, seconds=2.0),
    )
    course = RefinementReport(
        start_loss=0.8,
        start_held_out_loss=1.2,
        epochs=epochs,
        kept_epoch=kept,
        trained_params=1,
        seconds=2.0,
    )
    return [block.model_copy(update={"refinement": course}) for block in blocks]


def test_texts_that_were_measured_on_have_a_line():
    error, cosine = charts_of_errors(depths.build([0.1, 0.2], [0.3, 0.4], [0.5, 0.6]).blocks)
    assert labels(error) == ["held-out text", "calibration text", "before refinement"]
    assert "block 1, held-out text: 0.400" in titles(error)
    assert "block 1, held-out text: 0.100" in titles(cosine)
    assert "block 0, before refinement: 1.00" in titles(error)
    error, _ = charts_of_errors(depths.build([0.1, 0.2]).blocks)
    assert labels(error) == ["calibration text"]


def test_a_refinement_is_drawn_over_its_start():
    training, held_out = charts_of_refinement(refined(depths.build([0.1, 0.2]).blocks, 1))
    assert "block 0: epoch 1 kept, 50.0 % of the start" in titles(training)
    assert "block 1: epoch 1 kept, 50.0 % of the start" in titles(held_out)
    assert charts_of_refinement(depths.build([0.1]).blocks) == ()


def test_a_row_a_block():
    blocks = depths.build([0.1, 0.2], [0.3, 0.4], [0.5, 0.6]).blocks
    table = table_of_blocks(refined(blocks, 2))
    assert table.rows[1][:6] == ("model.layers.1", "0.400", "0.100", "0.200", "1.20", "2")
    plain = table_of_blocks(depths.build([0.1]).blocks)
    assert plain.rows[0][:4] == ("model.layers.0", "–", "–", "0.100")
    assert all(len(row) == len(t.columns) for t in (table, plain) for row in t.rows)
