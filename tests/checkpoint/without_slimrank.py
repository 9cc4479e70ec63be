"""Loads folders by the file that they carry, in a process that cannot import slimrank.

Arguments: a JSON list of what to load, and a folder for what comes of it.
"""

import copy
import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


class Nowhere(MetaPathFinder):
    """Where slimrank is to be found."""

    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname.partition(".")[0] == "slimrank":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def loaded(folder: str, settings: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"trust_remote_code": True, **settings})


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def told(job: dict[str, Any], ids: torch.Tensor, out: Path) -> dict[str, torch.Tensor]:
    """What a folder says: loaded, copied, and saved and loaded again."""
    model = loaded(job["folder"], job["settings"])
    assert not model.training
    start = ids[:, :5]
    written = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    found = {"logits": logits(model, ids), "written": written}
    if job["again"]:
        found["copied"] = logits(copy.deepcopy(model), ids)
        model.save_pretrained(out / job["name"])
        again = loaded(str(out / job["name"]), job["settings"])
        found["again"] = logits(again, ids)
    return found


def main() -> None:
    sys.meta_path.insert(0, Nowhere())
    torch.set_num_threads(1)
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ids = load_file(out / "ids.safetensors")["ids"]
    errors: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for job in jobs:
        try:
            found = told(job, ids, out)
        except Exception as error:  # noqa: BLE001
            errors[job["name"]] = f"{type(error).__name__}: {error}"
        else:
            tensors |= {f"{job['name']}.{key}": t.contiguous() for key, t in found.items()}
    assert "slimrank" not in sys.modules
    save_file(tensors, out / "told.safetensors")
    (out / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
