"""Compress a model that is in memory, on text of your own: compress_in_memory.py MODEL TEXT OUT."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from slimrank import CompressionRecipe, compress

model_path, text, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_path)
tokenizer = AutoTokenizer.from_pretrained(model_path)
recipe = CompressionRecipe(
    budget={"param_ratio": 0.8},
    calibration={"source": [text], "num_sequences": 16, "sequence_length": 64},
)
report = compress(model, recipe, tokenizer=tokenizer, out=out)
worst = max(report.linears, key=lambda linear: linear.measured_loss)
print(report.size.line())
print(f"{worst.name} lost most: {worst.measured_loss:.2%} of its outputs' energy")
