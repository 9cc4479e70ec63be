"""Tables of docs/plan.md, from the committed results: cog writes them, `make docs` checks them."""

from typing import Any

from _tables import header, read, row


def large() -> None:
    """What plans say of models that no machine of ours could run."""
    found = read("estimates")["results"]["planned only"]
    header("model, run", "memory, GB", "in", "most of it, GB", "disk, GB", "stays, GB", "passes")
    for name, told in found.items():
        held = sorted(told["held"].items(), key=lambda item: -item[1])[:2]
        row(
            name,
            f"{told['memory'] / 1e9:,.0f}",
            told["largest"],
            ", ".join(f"{what} {size / 1e9:,.0f}" for what, size in held),
            f"{told['disk'] / 1e9:,.0f}",
            f"{told['stays'] / 1e9:,.0f}",
            _passes(told["passes"]),
        )


def measured() -> None:
    """Plans beside what runs took."""
    found = read("estimates")["results"]["measured"]
    header("model: run", "memory planned, MB", "measured", "ratio", "disk planned, MB", "measured")
    for name, both in found.items():
        planned, seen, ratios = (
            both[key] for key in ("planned", "measured", "planned_over_measured")
        )
        row(
            name,
            f"{planned['memory'] / 1e6:,.0f}",
            f"{seen['memory'] / 1e6:,.0f}",
            f"{ratios['memory']:.2f}",
            f"{planned['disk'] / 1e6:,.0f}",
            f"{seen['disk'] / 1e6:,.0f}",
        )
    ratios = [both["planned_over_measured"]["memory"] for both in found.values()]
    print()
    print(
        f"Of {len(ratios)} runs the ratio is {min(ratios):.2f} to {max(ratios):.2f} "
        "([figures](../benchmarks/results/estimates.json))."
    )


def _passes(passes: dict[str, Any]) -> str:
    """Forwards and backwards of calibration text, forwards of held-out text."""
    forwards = passes["forwards"] + passes["check_forwards"]
    text = f"{forwards:.3g} / {passes['backwards']:.3g}"
    return f"{text}, {passes['held_out_forwards']:.3g}" if passes["held_out_forwards"] else text
