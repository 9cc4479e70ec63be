"""Use a compressed folder with plain transformers: load_and_generate.py FOLDER PROMPT."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import slimrank  # noqa: F401  registers the format; without it the next line stops

folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
