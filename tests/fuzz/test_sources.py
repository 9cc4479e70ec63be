"""No source of slimrank can read a pickle or run what a file says."""

import ast
from pathlib import Path

import pytest

import slimrank

SOURCES = sorted(Path(slimrank.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    *("torch.load", "torch.save", "torch.hub.load", "numpy.load", "np.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.UnsafeLoader"),
    *("yaml.Loader", "yaml.FullLoader", "os.system"),
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.AST) -> list[str]:
    """What a source must not have."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [n for n in names if n in ATTRIBUTES or n.split(".")[0] in MODULES]
        elif isinstance(node, ast.Attribute) and dotted(node) in ATTRIBUTES:
            found.append(dotted(node))
        elif isinstance(node, ast.Call) and dotted(node.func) in CALLS:
            found.append(dotted(node.func))
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only"):
            is_off = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if is_off and node.arg == "trust_remote_code" else [str(node.arg)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_runs_what_a_file_says(path):
    assert faults(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import yaml\nyaml.load('x', Loader=yaml.SafeLoader)",
        "import yaml\nclass L(yaml.Loader): pass",
        "eval('1')",
        "exec('1')",
        "f(trust_remote_code=True)",
    ],
)
def test_the_check_sees(source):
    assert faults(ast.parse(source))
