"""Put the packaged calibration text together from prose, source code and technical text.

    python benchmarks/mixed_text.py PROSE SDISTS --out src/slimrank/data/calibration.txt

Run with CPython 3.11.7, whose library the source code is from, and with numpy, mpmath and
scikit-learn of the versions that src/slimrank/data/ATTRIBUTION.md names. PROSE is Wikipedia text
with headings like ` = Title = `, the file as it was before it was mixed; SDISTS holds the unpacked
source distributions of sympy and networkx.
"""

import argparse
import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

LENGTHS = {"prose": 2000, "code": 1000, "technical": 1000}  # characters after which a piece may end

# The longest articles are left out: what is kept is of more kinds.
LEFT_OUT = (
    "Anarchism",
    "Alabama",
    "Abraham Lincoln",
    "Alaska",
    "Afghanistan",
    "American Revolutionary War",
)
MODULES = (
    "heapq",
    "textwrap",
    "fractions",
    "string",
    "shlex",
    "calendar",
    "random",
    "json/decoder",
    "csv",
    "graphlib",
    "urllib/robotparser",
    "html/parser",
    "tempfile",
    "sched",
    "copy",
)
PAGES = (
    "sympy-1.14.0/doc/src/tutorials/intro-tutorial/intro.rst",
    "sympy-1.14.0/doc/src/explanation/glossary.md",
    "sympy-1.14.0/doc/src/explanation/special_topics/finite_diff_derivatives.rst",
    "sympy-1.14.0/doc/src/guides/solving/find-roots-polynomial.md",
    "sympy-1.14.0/doc/src/guides/solving/solving-guidance.md",
    "sympy-1.14.0/doc/src/guides/solving/solve-matrix-equation.md",
    "networkx-3.6.1/doc/developer/nxeps/nxep-0000.rst",
)
DOCUMENTED = ("numpy/fft/__init__", "numpy/linalg/_linalg", "mpmath/calculus/differentiation")


def main() -> None:
    """Write the text, and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prose", type=Path)
    parser.add_argument("sdists", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    kinds = {
        "prose": [packed(a, "prose") for a in articles(args.prose.read_text(encoding="utf-8"))],
        "code": [packed(module(name), "code") for name in MODULES],
        "technical": [packed(page, "technical") for page in pages(args.sdists)],
    }
    pieces = {kind: [p for work in works for p in work] for kind, works in kinds.items()}
    text = interleaved(pieces)
    args.out.write_text(text, encoding="utf-8")
    for kind, works in kinds.items():
        size = sum(len(p.encode()) for p in pieces[kind])
        print(f"{kind}: {len(works)} works, {len(pieces[kind])} pieces, {size:,} bytes")
    print(f"{len(text.encode()):,} bytes, sha256 {hashlib.sha256(text.encode()).hexdigest()}")


def articles(text: str) -> Iterator[list[str]]:
    """Paragraphs of each article, a heading staying with what follows it."""
    for article in re.split(r"(?m)^(?= = [^=].* = $)", text):
        if article.strip() and article.split("\n")[0].strip(" =") not in LEFT_OUT:
            yield re.split(r"\n\n(?! = )(?<! = \n\n)", article.strip("\n"))


def module(name: str) -> list[str]:
    """Functions, methods and what is between them, each with its decorators and comments."""
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = {0}
    for node in definitions(ast.parse("\n".join(lines)).body):
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        while start and lines[start - 1].lstrip().startswith("#"):
            start -= 1
        starts.add(start)
    bounds = [*sorted(starts), len(lines)]
    return ["\n".join(lines[a:b]).strip("\n") for a, b in pairwise(bounds)]


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Top-level functions and classes, and the methods of those classes."""
    for node in body:
        if isinstance(node, Definition):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from definitions([n for n in node.body if not isinstance(n, ast.ClassDef)])


def pages(sdists: Path) -> Iterator[list[str]]:
    """Paragraphs of pages of documentation, of descriptions of data sets, and of docstrings."""
    for name in PAGES:
        yield paragraphs((sdists / name).read_text(encoding="utf-8"))
    for path in sorted((installed("sklearn") / "datasets" / "descr").glob("*.rst")):
        yield paragraphs(path.read_text(encoding="utf-8"))
    for name in DOCUMENTED:
        package, inside = name.split("/", 1)
        path = installed(package) / f"{inside}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [tree, *definitions(tree.body)]
        docs = [(getattr(n, "name", package), ast.get_docstring(n)) for n in found]
        yield [f"{name}\n\n{inspect.cleandoc(doc)}" for name, doc in docs if doc]


def installed(package: str) -> Path:
    """Folder of an installed package."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def paragraphs(text: str) -> list[str]:
    """Parts between blank lines, an indented one staying with what is before it."""
    return re.split(r"\n\s*\n(?=\S)", text.expandtabs().strip("\n"))


def packed(parts: Iterable[str], kind: str) -> list[str]:
    """Join the parts of a work to pieces of about a length, the last one maybe longer."""
    pieces: list[str] = []
    for part in parts:
        between = "\n\n\n" if kind == "code" and part[:1] != " " else "\n\n"
        if pieces and len(pieces[-1]) < LENGTHS[kind]:
            pieces[-1] += between + part
        else:
            pieces.append(part)
    if len(pieces) > 1 and len(pieces[-1]) < LENGTHS[kind] / 3:
        last = pieces.pop()
        pieces[-1] += "\n\n" + last
    return pieces


def interleaved(pieces: dict[str, list[str]]) -> str:
    """Take, each time, the next piece of the kind of which the smallest part was taken."""
    totals = {kind: sum(map(len, of)) for kind, of in pieces.items()}
    taken = dict.fromkeys(pieces, 0)
    left = {kind: iter(of) for kind, of in pieces.items()}
    out: list[str] = []
    while len(out) < sum(map(len, pieces.values())):
        kind = min(pieces, key=lambda kind: taken[kind] / totals[kind])
        out.append(next(left[kind]))
        taken[kind] += len(out[-1])
    return "\n\n".join(out) + "\n"


if __name__ == "__main__":
    main()
