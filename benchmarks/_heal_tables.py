"""The table of docs/heal.md, from the committed results: cog writes it, `make docs` checks it."""

from typing import Any

from _tables import RESULTS, header, read, row


def figures() -> None:
    """Perplexity and divergence before and after, with time; nothing until it was measured."""
    if not (RESULTS / "heal.json").is_file():
        return
    record = read("heal")
    settings, found = record["settings"], record["results"]
    print("\n## What it brought\n")
    header("kept", "healed on", "test perplexity", "held-out divergence, nats", "seconds")
    row("dense", "", f"{found['dense']['value']:.2f}", "", "")
    for keep in map(str, settings["keeps"]):
        for name, told in found[keep].items():
            value = f"{told['perplexity']['value']:.2f}"
            row(keep, *_cells(name, value, told))
    length = settings["sequence_length"]
    print(
        f"\n{settings['model']}, `--effort {settings['effort']}`; sequences of {length} tokens; "
        f"{settings['held_out']} of them held out; test text `{settings['test']}` in windows of "
        f"{settings['test_length']}. Seconds on {record['environment']['threads']} threads of "
        f"{record['environment']['processor']}, loading and writing included "
        "([figures](../benchmarks/results/heal.json))."
    )


def _cells(name: str, value: str, told: dict[str, Any]) -> tuple[str, ...]:
    if "report" not in told:
        return "", value, "", f"{told['seconds']:.0f}"
    report = told["report"]
    before, after = report["checks"][0]["divergence"], report["divergence"]
    return name, value, f"{before:.4f} → {after:.4f}", f"{told['seconds']:.0f}"
