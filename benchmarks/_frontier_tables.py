"""Tables of the frontier, from `ablation.json` and `zero_shot.json`; see `_tables`."""

import math
from typing import Any

from _rows import plainly
from _tables import header, read, row
from ablation import BEST_EFFORT, DEFAULT, OWN, OWN_TUNED, PUBLISHED, TWICE, UNIFORM

TITLES = ("Δ, share of the first", "WikiText-2", "other")
EARLIER = {"damping": 1e-3}  # the default when some rows were measured; see the search for it
SIZES = (0.8, 0.6, 0.4)


def parts() -> None:
    """Each ingredient alone and left out, without training."""
    kfac = {"method": "kfac-svd"}
    ranks, pivoted = {"allocation": "global"}, {"layout": "auto"}
    rows: list[tuple[str, dict[str, Any]]] = [
        ("inputs, uniform, plain", UNIFORM),
        ("inputs, global relative, plain", {**UNIFORM, **ranks, **_unit("relative")}),
        ("K-FAC, uniform, plain", kfac),
        ("inputs, uniform, pivoted", {**UNIFORM, **pivoted}),
        ("inputs, global gradient, plain", {**UNIFORM, **ranks, **_unit("gradient")}),
        ("inputs, global kfac, plain", {**UNIFORM, **ranks}),
        ("K-FAC, uniform, pivoted", {**kfac, **pivoted}),
        ("K-FAC, global kfac, plain", {**kfac, **ranks}),
        ("inputs, global kfac, pivoted", {**UNIFORM, **ranks, **pivoted}),
        ("K-FAC, global kfac, pivoted: the default", DEFAULT),
        ("the same, two passes", TWICE),
    ]
    _table("metric of the solve, allocation, layout", rows, (0.8, 0.6))


def frontier() -> None:
    """The default and what more work adds, beside the published recipe."""
    gradient = {"preset": "fast", "loss": "gradient"}
    rows: list[tuple[str, dict[str, Any]]] = [
        ("`swift-svd`, uniform, plain", UNIFORM),
        ("the same, refined as published, 10 epochs", PUBLISHED),
        ("**default**: `kfac-svd`, global, pivoted", DEFAULT),
        ("`kfac-aa-svd`, global, pivoted", {**DEFAULT, "method": "kfac-aa-svd"}),
        ("default, two passes", TWICE),
        ("`kfac-aa-svd`, two passes", {**TWICE, "method": "kfac-aa-svd"}),
        ("default, blocks refined by `mse`", {**DEFAULT, "refine": "fast"}),
        ("default, blocks refined by `gradient`", {**DEFAULT, "refine": gradient}),
        ("two passes, tuned", {**TWICE, "tune": {}}),
        ("two passes, blocks refined, tuned", {**TWICE, "refine": "fast", "tune": {"epochs": 12}}),
        ("default, 96 sequences of its own", {**OWN, "passes": 1}),
        ("two passes, 96 of its own", OWN),
        ("two passes, 96 of its own, tuned", OWN_TUNED),
        ("**best**: two passes, 128 of its own, blocks refined, tuned", BEST_EFFORT),
    ]
    _table("SmolLM2-135M", rows, SIZES)


def steady() -> None:
    """Uniform ranks, the default and more, on three draws of the text and on four times as much."""
    record = read("ablation")
    dense = _dense(record)["test"]
    ways: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [
        ("uniform", UNIFORM, SIZES[:2]),
        ("default", DEFAULT, SIZES[:2]),
        ("two passes", TWICE, (0.6,)),
        ("two passes, 96 of its own, tuned", OWN_TUNED, (0.6,)),
    ]
    columns = [(keep, way) for keep in SIZES[:2] for way in ways if keep in way[2]]
    header("drawn", *(f"{keep}: {name}" for keep, (name, *_) in columns))
    for title, drawn in (
        *((f"48 sequences, seed {seed}", {"seed": seed}) for seed in range(3)),
        ("192 sequences, seed 0", {"sequences": 192}),
    ):
        cells: list[str] = []
        for keep, (_, keys, _) in columns:
            found, uniform = (_find(record, keep, {**of, **drawn}) for of in (keys, UNIFORM))
            if found is None:
                cells.append("-")
                continue
            share = ""
            if uniform is not None and keys is not UNIFORM:
                delta, first = (
                    math.log(run["perplexity"]["test"] / dense) for run in (found, uniform)
                )
                share = f" ({delta / first:.3f})"
            cells.append(f"{found['perplexity']['test']:.1f}{share}")
        row(title, *cells)


def peers() -> None:
    """Every method at the same tokens: what it looks at, what it costs, what it gets."""
    record = read("ablation")
    dense = _dense(record)
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("SVD", "`svd`", {"method": "svd"}),
        ("FWSVD", "`fwsvd`", {"method": "fwsvd"}),
        ("ASVD", "`asvd`", {"method": "asvd"}),
        ("SVD-LLM", "`svd-llm`", {"method": "svd-llm"}),
        ("Swift-SVD, objective 2", "`swift-svd`", UNIFORM),
        ("Dobi-SVD's objective, 3", "`shift-aware`", {"method": "shift-aware"}),
        ("AA-SVD, objective 4", "`aa-svd`", {"method": "aa-svd"}),
        ("AA-SVD as published", "`swift-svd`, refined", PUBLISHED),
        ("ZS-SVD", "`--allocation threshold`", {**UNIFORM, "allocation": "threshold"}),
        ("default here", "`kfac-svd`, global, pivoted", DEFAULT),
        ("and anchored", "`kfac-aa-svd`, two passes", {**TWICE, "method": "kfac-aa-svd"}),
        ("and tuned", "`--passes 2 --tune 16`", {**TWICE, "tune": {}}),
        ("and more of its own text", "`--passes 2 --generate 96 --tune 8`", OWN_TUNED),
        ("most effort here", "`--effort best`", BEST_EFFORT),
    ]
    header("after", "here", "seconds", "0.6 kept: WikiText-2", "other", "Δ")
    for name, here, keys in rows:
        found = _find(record, 0.6, keys)
        if found is None:
            continue
        value = found["perplexity"]
        row(
            name,
            here,
            f"{found['seconds']:.0f} ({'GPU' if found['ran_on'].startswith('cuda') else 'CPU'})",
            *(_short(value[text]) for text in ("test", "other")),
            f"{math.log(value['test'] / dense['test']):.2f}",
        )


def zero_shot() -> None:
    """Accuracy of the dense model, of uniform ranks, of the default and of the highest effort."""
    rows = []
    for run in read("zero_shot")["runs"]:
        accuracy = {task: (x["value"], x["stderr"]) for task, x in run["accuracy"].items()}
        name, _, keep = run["name"].partition(" @ ")
        rows.append((name, keep, run["perplexity"]["wikitext-2"]["value"], accuracy))
    record = read("ablation")
    for keep in SIZES:
        found = _find(record, keep, BEST_EFFORT)
        if found is not None and "accuracy" in found:
            rows.append(("best", str(keep), found["perplexity"]["test"], found["accuracy"]))
    tasks = list(rows[0][3])
    header("model", "kept", "WikiText-2", *tasks, "mean", "mean without boolq")
    for name, kept, perplexity, accuracy in rows:
        values = ["{:.3f} ± {:.3f}".format(*accuracy[task]) for task in tasks]
        some = [task for task in tasks if task != "boolq"]
        means = [sum(accuracy[t][0] for t in of) / len(of) for of in (tasks, some)]
        row(name, kept or "all", f"{perplexity:.1f}", *values, *(f"{mean:.3f}" for mean in means))


def int8() -> None:
    """What int8 weights and int8 factors get at their bytes."""
    header("model", "MB of the linears", "MB of the model", "WikiText-2", "other")
    for run in sorted(read("int8")["runs"], key=lambda run: -run["bytes"]):
        values = [figure["value"] for figure in run["perplexity"].values()]
        sizes = (f"{run[key] / 1e6:.1f}" for key in ("linear_bytes", "bytes"))
        row(run["name"].replace("layout=", ""), *sizes, *(f"{value:.1f}" for value in values))


def default() -> None:
    """The default beside what others do, for the README."""
    record = read("ablation")
    dense = _dense(record)
    header(
        "SmolLM2-135M", "0.8 kept: WikiText-2", "other text", "0.6 kept: WikiText-2", "other text"
    )
    row("dense", *(f"{dense[text]:.1f}" for _ in range(2) for text in ("test", "other")))
    for name, keys in (
        ("**slimrank**", DEFAULT),
        ("the same, `--effort best`", BEST_EFFORT),
        ("SVD-LLM and Swift-SVD, uniform ranks", UNIFORM),
        ("the same, refined as AA-SVD publishes it", PUBLISHED),
    ):
        cells: list[str] = []
        for keep in (0.8, 0.6):
            found = _find(record, keep, keys)
            assert found is not None
            cells += [f"{found['perplexity'][text]:.1f}" for text in ("test", "other")]
        row(name, *cells)
    print()
    print(
        "Perplexity; weights dequantised from 4 bits, float32; the share of the parameters of the "
        "decoder's linears; calibrated on 48 sequences of 512\ntokens of Wikipedia prose; all of "
        "the WikiText-2 test split in windows of 1,024, and a manual of a programming language\n"
        "([how, and what each part gives](docs/frontier.md); "
        "[figures](benchmarks/results/ablation.json))."
    )


def _unit(name: str) -> dict[str, Any]:
    return {"global_ranks": {"unit": name}}


def _table(title: str, rows: list[tuple[str, dict[str, Any]]], sizes: tuple[float, ...]) -> None:
    record = read("ablation")
    dense = _dense(record)["test"]
    header(title, *(f"{keep}: {name}" for keep in sizes for name in TITLES))
    for name, keys in rows:
        cells: list[str] = []
        for keep in sizes:
            first, found = _find(record, keep, UNIFORM), _find(record, keep, keys)
            assert first is not None
            if found is None:
                cells += ["-"] * len(TITLES)
                continue
            asked = keys.get("sequences", 48) + keys.get("generated_sequences", 0)
            mark = "*" if found["tokens"] > asked * 512 else ""
            values = found["perplexity"]
            most = math.log(first["perplexity"]["test"] / dense)
            cells.append(f"{math.log(values['test'] / dense) / most:.3f}{mark}")
            cells += [_short(values[text]) for text in ("test", "other")]
        row(name, *cells)


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1e5 else f"{value:.1e}"


def _dense(record: Any) -> dict[str, float]:
    found: dict[str, float] = next(x for x in record["results"] if x["wanted"] == "dense")[
        "perplexity"
    ]
    return found


def _find(record: Any, keep: float, keys: dict[str, Any]) -> Any:
    """The row of these settings; where there is none, that of the damping of an earlier day."""
    for extra in ({}, EARLIER):
        wanted = plainly({"keep": keep, "sequences": 48, **keys, **extra})
        for found in record["results"]:
            if found["wanted"] != "dense" and plainly(found["wanted"]) == wanted:
                return found
    return None
