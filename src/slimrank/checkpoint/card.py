"""The model card: what it is, what it weighs, how to load it."""

from pathlib import Path

from slimrank.checkpoint.remote_code import REMOTE_CODE
from slimrank.report import CompressionReport

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- low-rank
- slimrank
---

# {title}

{name} with {count} of its linears factorised to low rank by slimrank {version}, method
`{method}`.{origin}

**Size**: {line}.

**Loss**: the factorised linears lose {loss:.2%} of the energy of their outputs, on average over
linears, on the {tokens:,} calibration tokens ({source}). Perplexity on text of your own:
`slimrank evaluate . --text FILE`.
{blocks}
## Load

slimrank must be imported first. Without it transformers stops with a size mismatch.

```python
import slimrank
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```
{without}
## How it was made

```
slimrank compress {name} {title} --recipe recipe.yaml
```

`recipe.yaml` and `report.json` beside this file hold every setting, and for each linear its rank
and the loss that was promised and measured.
{notes}
The weights remain under the licence of {name}.
"""


def model_card(report: CompressionReport, title: str, remote_code: bool = False) -> str:
    """Write the card of a compressed folder.

    Parameters
    ----------
    report : CompressionReport
    title : str
        Name of the folder.
    remote_code : bool
        The modelling file is there.
    """
    factorised = [linear for linear in report.linears if linear.rank is not None]
    losses = [linear.measured_loss for linear in factorised]
    notes = "".join(f"\n- {warning}" for warning in report.warnings)
    source = ", ".join(report.recipe.calibration.source) or "the sample packaged with slimrank"
    if report.recipe.generated_sequences:
        source += f"; {report.recipe.generated_sequences} sequences by the original model"
    gguf = report.model.endswith(".gguf")
    local = gguf or Path(report.model).is_dir()
    return TEMPLATE.format(
        base="" if local else f"base_model: {report.model}\n",
        name=Path(report.model).name if local else report.model,
        origin=" The dense weights were dequantised from a GGUF file." if gguf else "",
        title=title,
        count=len(factorised),
        version=report.environment["slimrank"],
        method=report.recipe.method,
        line=report.size.line(),
        loss=sum(losses) / len(losses) if losses else 0.0,
        tokens=report.tokens,
        source=source,
        blocks=_blocks(report),
        without=without_slimrank() if remote_code else "",
        notes=f"\nRemarks:\n{notes}\n" if notes else "",
    )


def without_slimrank() -> str:
    """Say how a folder loads that carries the modelling file."""
    return f"""
Where slimrank is not installed, `from_pretrained(..., trust_remote_code=True)` runs the short file
`{REMOTE_CODE}` of this folder, and gives the same model.
"""


def _blocks(report: CompressionReport) -> str:
    """What is known of the blocks' outputs; nothing of a one-shot run."""
    if not report.blocks:
        return ""
    last = report.blocks[-1]
    found, text = last.held_out, "held-out text"
    if found is None:
        found, text = last.calibration, "the calibration text"
    trained = any(block.refinement for block in report.blocks)
    then = " and was then trained towards the original block; the losses are from before" * trained
    return (
        "\n**Blocks**: each was compressed on what the compressed blocks before it give"
        f"{then}. The\nlast block's output differs from the original's by "
        f"{found.relative_error:.2%} of its energy on {text}.\n"
    )
