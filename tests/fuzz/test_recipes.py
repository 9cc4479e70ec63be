"""Recipes and benchmarks: any YAML, any bytes."""

import pytest
import yaml
from hypothesis import given

from fuzz.mutation import as_json, mutated, spoiled
from fuzz.properties import examples, right_or_refused
from slimrank import CompressionRecipe
from slimrank.cli.options import build_recipe
from slimrank.frontier import BenchRecipe
from slimrank.frontier.cells import cells

RECIPE = CompressionRecipe.from_dict(
    {
        "effort": "fast",
        "allocation": "swift",
        "budget": {"param_ratio": 0.5},
        "refine": "fast",
        "tune": {"epochs": 2},
        "kv_cache": {"keep": 0.5},
        "targets": ["up_proj"],
        "calibration": {"source": ["x.txt"]},
    }
)
BENCH = {
    "model": "m",
    "texts": {"a": {"path": "a.txt", "in_domain": True}, "b": {"path": "b.txt"}},
    "windows": {"length": 64, "number": 4},
    "base": {"calibration": {"source": ["x"], "num_sequences": 8}, "budget": {"scope": "model"}},
    "keep": [0.8, 0.6],
    "grid": {"method": ["svd", "swift-svd"], "refine.preset": ["off", "fast"]},
    "runs": [{"name": "r", "recipe": {"budget": {"param_ratio": 0.5}}}],
    "zero_shot": {"folder": "q", "tasks": ["t"], "limit": 4},
}


def doubling(first: str, pattern: str, times: int) -> str:
    """Aliases of aliases: a few hundred bytes that are billions of values."""
    return f"a0: &a0 {first}\n" + "".join(
        f"a{n + 1}: &a{n + 1} {pattern.format(f'*a{n}')}\n" for n in range(times)
    )


HOSTILE = {
    "runs a command": "!!python/object/apply:os.system [touch pwned]",
    "runs a command under a key": "budget: !!python/object/new:os.system [touch pwned]",
    "imports a name": "method: !!python/name:os.system",
    "has a tag of its own": "%TAG ! tag:yaml.org,2002:python/\n---\nmethod: !name:os.system",
    "a billion laughs": doubling("[x, x]", "[{0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}]", 20),
    "laughs in mappings": doubling("{a: 1}", "{{a: {0}, b: {0}}}", 40),
    "laughs in merges": doubling("{a: 1}", "{{<<: [{0}, {0}, {0}, {0}, {0}]}}", 15),
    "holds itself": "budget: &a {param_ratio: *a}",
    "holds itself in a list": "targets: &a [*a]",
    "is its own key": "&a a: *a",
    "is deep": "[" * 3_000,
    "is deep in dashes": "- " * 5_000,
    "is deep in mappings": "{a: " * 3_000,
    "is long": "#" * (2**24 + 1),
    "has a number of 9000 digits": "calibration: {seed: " + "9" * 9_000 + "}",
    "has a hexadecimal number": "calibration: {seed: 0x" + "f" * 9_000 + "}",
    "has no number": "a: 0x_",
    "has no day": "a: 2001-99-99",
    "has no binary": "a: !!binary x",
    "has no truth": "a: !!bool x",
    "has no time": "a: !!timestamp x",
    "is not finite": "budget: {param_ratio: .nan}",
    "is infinite": "budget: {param_ratio: .inf}",
    "has a list as key": "? [a]\n: b",
    "has a number as key": "{1: 2}",
    "has numbers as keys below": "refine: {1: 2}",
    "is two documents": "--- a\n--- b",
    "is nothing": "",
    "has half a letter": 'blocks: "\\ud800"\nbudget: {param_ratio: 0.5}',
    "has a NUL": "a: 'x\0'",
    "has a list as effort": "effort: [1]",
    "has a mapping as preset": "refine: {preset: {}}",
    "has a word as budget": "base: {budget: 3}\nmodel: m\ntexts: {a: {path: x}}",
    "names an unknown method at length": "method: " + "x" * 100_000,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml") / "r.yaml"


def read_both(path, content):
    path.write_bytes(content)
    recipe = right_or_refused(lambda: CompressionRecipe.from_file(path), path)
    if recipe is not None:
        assert CompressionRecipe.from_yaml(recipe.to_yaml()) == recipe
        assert len(recipe.fingerprint()) == 64
    right_or_refused(lambda: BenchRecipe.from_file(path), path)


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml(path, content, monkeypatch):
    monkeypatch.chdir(path.parent)
    read_both(path, content.encode())
    assert not (path.parent / "pwned").exists()


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"a: \xc3\x28", b"\x00" * 50, b"\xef\xbb\xbf"]
)
def test_what_is_no_text(path, content):
    read_both(path, content)


@examples(60)
@given(tree=mutated(yaml.safe_load(RECIPE.to_yaml())))
def test_changed_recipes(path, tree):
    path.write_bytes(as_json(tree))
    recipe = right_or_refused(lambda: CompressionRecipe.from_file(path), path)
    if recipe is not None:
        assert CompressionRecipe.from_yaml(recipe.to_yaml()) == recipe


@examples(30)
@given(tree=mutated(yaml.safe_load(RECIPE.to_yaml())))
def test_changed_recipes_with_flags(path, tree):
    path.write_bytes(as_json(tree))
    flags = {"budget__param_ratio": 0.5, "refine__preset": "fast", "tune__epochs": 3}
    right_or_refused(lambda: build_recipe(path, **flags, calibration__seed=1), path)


@examples(50)
@given(content=spoiled(RECIPE.to_yaml().encode()))
def test_spoiled_recipes(path, content):
    read_both(path, content)


@examples(50)
@given(tree=mutated(BENCH))
def test_changed_benchmarks(path, tree):
    path.write_bytes(as_json(tree))
    bench = right_or_refused(lambda: BenchRecipe.from_file(path), path)
    if bench is not None:
        right_or_refused(lambda: cells(bench))
