"""Rows are runs that differ in one choice from the plainest or from the best of their size."""

from slimrank.pages.ablation import tables_of_ablation


def test_alone_and_taken_away(make_frontier, make_run):
    report = make_frontier(
        make_run("plain", perplexity=160.0),
        make_run("pivoted", perplexity=80.0, layout="pivoted"),
        make_run("both", perplexity=40.0, layout="pivoted", allocation="global"),
        make_run("global", perplexity=100.0, allocation="global"),
        make_run("elsewhere", perplexity=41.0, method="svd", layout="pivoted", allocation="greedy"),
        make_run("other size", perplexity=30.0, keep=0.9),
    )
    (table,) = tables_of_ablation(report, "wiki")
    assert table.caption == "Ingredients at keep 0.8, on wiki"
    assert [row[:2] for row in table.rows] == [
        ("plain", "plain"),
        ("plain, but layout pivoted", "pivoted"),
        ("plain, but allocation global", "global"),
        ("best, but allocation uniform", "pivoted"),
        ("best, but layout plain", "global"),
        ("best", "both"),
    ]
    assert table.rows[0][2:] == ("160", "2.079", "1.00", "1.00 MB")
    assert table.rows[-1][2:] == ("40.0", "0.693", "0.33", "1.00 MB")


def test_refinement_brings_its_order_along(make_frontier, make_run):
    report = make_frontier(
        make_run("plain", perplexity=160.0, recipe={"order": "one-shot"}),
        make_run("refined", perplexity=90.0, refine="fast", recipe={"order": "sequential"}),
        make_run("ordered", perplexity=150.0, recipe={"order": "sequential"}),
    )
    (table,) = tables_of_ablation(report, "wiki")
    assert [row[0] for row in table.rows] == [
        "plain",
        "plain, but order sequential",
        "best, but refine off",
        "best",
    ]


def test_runs_with_int8_factors_are_compared_with_their_like(make_frontier, make_run):
    runs = [make_run("a", perplexity=50.0), make_run("b", perplexity=40.0, layout="pivoted")]
    runs += [make_run("c", perplexity=30.0, layout="auto")]
    runs += [{**run, "name": f"{run['name']}, int8", "int8_factors": True} for run in runs]
    one, other = tables_of_ablation(make_frontier(*runs), "wiki")
    assert one.caption == "Ingredients at keep 0.8, on wiki"
    assert other.caption == "Ingredients at keep 0.8 in int8, on wiki"
    assert [f"{row[1]}, int8" for row in one.rows] == [row[1] for row in other.rows]


def test_nothing_to_compare(make_frontier, make_run):
    assert tables_of_ablation(make_frontier(make_run("one")), "wiki") == ()
    broken = [make_run(name, error="no", layout=name) for name in ("plain", "pivoted", "auto")]
    assert tables_of_ablation(make_frontier(*broken), "wiki") == ()
    assert tables_of_ablation(make_frontier(make_run("one")), "another text") == ()
