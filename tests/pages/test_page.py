"""Pages are sound, self-contained HTML that shows the report, whatever its names are."""

import math
import re

import pytest

from slimrank.errors import CheckpointError
from slimrank.pages import read_shown, render, write_page
from slimrank.pages.page import FRONTIER
from slimrank.report import AllocationReport, ImportanceWeightTrial, KVCacheReport
from tiny import depths

OUTSIDE = {"src", "href", "srcset", "data", "action", "xlink:href"}


@pytest.fixture(scope="session")
def real_report(make_compressed):
    """Of a tiny Llama, compressed block after block and refined."""
    _, report = make_compressed(
        "llama",
        method="aa-svd",
        refine={"preset": "fast", "epochs": 2},
        budget={"param_ratio": 0.6},
    )
    return report


def test_a_real_report(real_report, read):
    html = render(real_report)
    page = read(html)
    text = " ".join(page.texts)
    for linear in real_report.linears:
        assert linear.name in text
    for heading in ("What was kept where", "Block after block", "Recipe", "Environment"):
        assert heading in text
    for title in ("Refinement on held-out sequences", "Predicted and measured loss"):
        assert title in text
    assert real_report.recipe.to_yaml().strip() in text
    assert real_report.environment["torch"] in text


def test_nothing_from_outside_and_no_script(make_report, make_frontier, make_run, read):
    for report in (make_report(), make_frontier(make_run("a"), make_run("b", layout="auto"))):
        html = render(report)
        page = read(html)
        assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
        assert not OUTSIDE & {name for name, _ in page.attributes}
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        assert not re.search(r"https?:|@import|url\((?!#)", html)
        assert "default-src 'none'" in html


def test_a_hostile_compression_stays_text(make_report, make_linear, hostile, read):
    linears = (make_linear(f"model.layers.0.{hostile}"),)
    report = make_report(
        model=hostile, warnings=(hostile,), environment={hostile: hostile}, linears=linears
    )
    calm = read(render(make_report(linears=(make_linear("model.layers.0.a"),), warnings=("a",))))
    page = read(render(report))
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("svg") == calm.tags.count("svg")
    assert page.texts.count(hostile) >= 4


def test_a_hostile_frontier_stays_text(make_frontier, make_run, hostile, read):
    run = make_run(hostile, method=hostile, layout=hostile, recipe={"order": hostile})
    run["perplexity"][hostile] = {"value": 1.0}
    run["accuracy"] = {hostile: {"value": 0.5, "stderr": 0.1, "n": 3}}
    failed = make_run(hostile, error=hostile)
    changes = {key: {hostile: hostile} for key in ("environment", "settings")}
    page = read(render(make_frontier(run, failed, model=hostile, date=hostile, **changes)))
    assert not {"script", "img"} & set(page.tags)
    assert page.texts.count(hostile) >= 8


def test_drawings_and_tables_can_be_heard(make_report, read):
    page = read(render(make_report()))
    drawings = [value for name, value in page.attributes if (name, value) == ("role", "img")]
    assert len(drawings) == page.tags.count("desc") >= 5
    assert page.tags.count("table") == page.tags.count("caption") >= 4
    assert ("scope", "col") in page.attributes
    assert ("lang", "en") in page.attributes


def test_a_one_shot_report_has_no_blocks(make_report):
    html = render(depths.build([]))
    assert "Block after block" not in html
    assert "Share of the parameters kept" not in html
    html = render(make_report(blocks=(), recipe=depths.build([]).recipe))
    assert "Block after block" not in html
    assert "mean loss of linears" in html


def test_a_tuned_run_that_is_not_in_sequence(make_report, make_tuning, read):
    report = make_report(blocks=(), recipe=depths.build([]).recipe, tuning=make_tuning())
    texts = read(render(report)).texts
    assert {"Tuning", "Training of all blocks together"} <= set(texts)
    assert texts.count("epoch 1 kept: 0.0450") == 1
    assert any(text.endswith("one-shot · tuned") for text in texts)
    page = " ".join(texts)
    assert "Block after block" not in page
    assert "They are those that the training of all blocks together started from." in page
    assert "worst 10.0 %; before all blocks were trained together" in page
    assert "All are losses of the factors before training." in page
    assert "all blocks trained together: 0.123 → 0.0450 nats a token on held-out text" in page


def test_losses_of_a_refined_run_are_from_before_it(make_report):
    words = "All are losses of the factors before training."
    assert words in render(make_report())
    plain = depths.build([]).recipe
    assert words not in render(make_report(blocks=(), recipe=plain))


def test_a_tuned_run_in_sequence(make_report, make_tuning, read):
    texts = read(render(make_report(tuning=make_tuning()))).texts
    assert "Tuning" not in texts
    assert texts.count("epoch 1 kept: 0.0450") == 1
    chart = texts.index("Training of all blocks together")
    assert texts.index("Block after block") < chart < texts.index("Checks, time and place")
    page = " ".join(texts)
    assert "all blocks trained together: 0.123 → 0.0450 nats a token on held-out text" in page
    assert "cosine distance 0.100; before all blocks were trained together" in page
    assert "Measured before all blocks were trained together." in page


def test_a_run_that_is_not_tuned_says_nothing_of_it(make_report):
    for report in (make_report(), make_report(blocks=()), depths.build([])):
        html = render(report)
        assert not re.search(
            "tuned|Tuning|blocks together|trained together|prediction divergence", html
        )


def test_cache_search_and_warnings_are_shown(make_report):
    html = render(
        make_report(
            kv_cache=KVCacheReport(dense_values=100, latent_values=50, value_bytes=2),
            allocation=AllocationReport(
                importance_weight=0.5,
                retained_share=0.5,
                trials=(ImportanceWeightTrial(importance_weight=0.5, perplexity=77.7),),
                uniform_perplexity=99.0,
            ),
            warnings=("mind the step",),
        )
    )
    for text in ("200 → 100 bytes a token", "α 0.5: 77.7", "uniform ranks", "mind the step"):
        assert text in html


def test_a_frontier_page(make_frontier, make_run, read):
    accuracy = {
        "piqa": {"value": 0.6, "stderr": 0.03, "n": 1838},
        "arc": {"value": 0.4, "stderr": 0.04, "n": 500},
    }
    runs = [
        make_run("plain", perplexity=60.0, accuracy=accuracy),
        make_run("global", perplexity=40.0, allocation="global"),
        make_run("both", perplexity=30.0, allocation="global", layout="pivoted", seconds=90.0),
        make_run("diverged", perplexity=math.inf),
        make_run("failed", error="NumericalError: not finite", accuracy=accuracy),
    ]
    texts = read(render(make_frontier(*runs))).texts
    for text in ("failed failed: NumericalError: not finite", "60.0 ± 3.0", "50.0 ± 2.5", "∞"):
        assert text in texts
    assert {"piqa (1,838)", "What each ingredient pays", "Dense baselines"} <= set(texts)
    assert "failed" not in texts


def test_an_empty_frontier(make_frontier, read):
    page = read(render(make_frontier(runs=[])))
    assert "0 runs" in page.texts


def test_a_folder_is_read_for_what_it_holds(make_report, make_frontier, make_run, tmp_path):
    report = make_report()
    folder = depths.write(report, tmp_path / "a")
    assert read_shown(folder) == report
    frontier = make_frontier(make_run("a"))
    (folder / FRONTIER).write_text(frontier.model_dump_json(by_alias=True))
    assert read_shown(folder) == frontier
    with pytest.raises(CheckpointError, match=r"holds no report\.json and no frontier\.json"):
        read_shown(tmp_path)
    (tmp_path / FRONTIER).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_shown(tmp_path)


def test_a_page_is_written_whole_and_not_over_another(tmp_path):
    out = tmp_path / "new" / "page.html"
    write_page("é", out)
    assert out.read_bytes() == "é".encode()
    assert out.stat().st_mode & 0o777 == 0o644
    with pytest.raises(CheckpointError, match="exists already; name another file, or say --force"):
        write_page("two", out)
    assert out.read_text(encoding="utf-8") == "é"
    write_page("two", out, force=True)
    assert out.read_text(encoding="utf-8") == "two"
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        write_page("one", tmp_path, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_page("one", tmp_path / "file" / "page.html")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_page("\ud800", tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
