"""The gap between promised and measured loss is said, not only drawn."""

from slimrank.pages.promises import chart_of_promises


def test_gaps_are_in_the_words(make_linear):
    own = [
        make_linear("layers.0.q", 1, predicted_loss=0.1, measured_loss=0.102, stored_loss=0.1122),
        make_linear("layers.1.q", None),
    ]
    chart = chart_of_promises(own, is_trained=False)
    assert "Largest gap: 0.02 of the loss" in chart.note
    assert "stored dtype, 0.1." in chart.note
    assert "predicted 0.1, measured 0.102" in chart.svg
    assert len(chart.legend) == 2
    assert "training" not in chart.note
    trained = chart_of_promises(own, is_trained=True)
    assert trained.note == f"{chart.note} All are losses of the factors before training."
