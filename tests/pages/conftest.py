"""Reports and frontiers to make pages of, and a reader that holds a page to be sound."""

from html.parser import HTMLParser

import pytest

from slimrank.pages import FrontierReport
from slimrank.report import LinearReport, RefinementEpoch, RefinementReport
from tiny import depths

HOSTILE = "</title></style><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7*7 }}"


class Reader(HTMLParser):
    """All tags, attributes and text of a page; fails on tags that do not match."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)


@pytest.fixture
def read():
    """`read(html)` gives a `Reader` that has read all of it."""

    def run(html):
        reader = Reader()
        reader.feed(html)
        reader.close()
        assert reader.open == []
        return reader

    return run


@pytest.fixture
def hostile():
    """A name that would like to be part of the page."""
    return HOSTILE


@pytest.fixture
def make_linear():
    """`make_linear(name, rank, **others)`: a report of a 10 x 10 linear, written by hand."""

    def make(name, rank=3, **others):
        params = 100 if rank is None else 20 * rank
        loss = 0.0 if rank is None else 0.1
        values = {"predicted_loss": loss, "measured_loss": loss, "stored_loss": loss, **others}
        return LinearReport(
            name=name, rank=rank, params_before=100, params=params, tokens=9, **values
        )

    return make


@pytest.fixture
def make_report(make_linear):
    """`make_report(**changes)`: four linears in two blocks, refined, by hand."""

    def make(**changes):
        linears = tuple(
            make_linear(f"model.layers.{block}.{kind}", rank)
            for block, ranks in enumerate(((3, 4), (2, None)))
            for kind, rank in zip(("q_proj", "up_proj"), ranks, strict=True)
        )
        report = depths.build([0.1, 0.2], [0.3, 0.4], [0.5, 0.6], method="aa-svd")
        return report.model_copy(update={"linears": linears, **changes})

    return make


@pytest.fixture
def make_tuning():
    """`make_tuning(kept, held_out)`: three epochs, whose losses held out are `held_out` or none."""

    def make(kept=1, held_out=(0.123, 0.045, 0.06, 0.07)):
        start, *others = held_out or (None,) * 4
        losses = zip((0.09, 0.05, 0.03), others, strict=True)
        return RefinementReport(
            loss="kl",
            start_loss=0.1,
            start_held_out_loss=start,
            epochs=tuple(
                RefinementEpoch(loss=loss, held_out_loss=other, seconds=1.0)
                for loss, other in losses
            ),
            kept_epoch=kept,
            trained_params=1,
            seconds=3.0,
        )

    return make


def _run(name, size, perplexity, **others):
    texts = {"wiki": {"value": perplexity, "tokens": 10, "in_domain": False}}
    return {"name": name, "bytes": size, "perplexity": texts, **others}


@pytest.fixture
def make_frontier():
    """`make_frontier(*runs, **changes)`: a frontier of a dense model and of runs given."""

    def make(*runs, **changes):
        dense = _run("dense", 2_000_000, 20.0, is_dense=True, method="dense")
        values = {"schema": 1, "model": "by hand", "runs": [dense, *runs], **changes}
        return FrontierReport.model_validate(values)

    return make


@pytest.fixture
def make_run():
    """`make_run(name, size, perplexity, **others)`: a run as JSON has it."""

    def make(name, size=1_000_000, perplexity=40.0, **others):
        choices = {"method": "swift-svd", "allocation": "uniform", "layout": "plain"}
        return _run(name, size, perplexity, **{"keep": 0.8, "refine": "off", **choices, **others})

    return make
