"""Ways in which a file can be spoiled, drawn by Hypothesis: bytes, values of JSON, headers."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

HUGE = 10**30
HOSTILE_NAMES = (
    *(
        "",
        ".",
        "..",
        "../../x",
        "/etc/passwd",
        "a/../../b",
        "a\0b",
        "x" * 70_000,
        "\u202e\n\x1b[31m",
    ),
    *("__class__", "self", "quant_method", "format_version", "\ud800"),
)
HOSTILE_NUMBERS = (
    *(0, -1, 1, 2**31, 2**63, -(2**63), 2**64, HUGE, -HUGE, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf")),
)
HOSTILE_VALUES = (
    *(None, True, False, [], {}, [[]], [{}], {"": {}}, [None], {"rank": 4}, "1", "NaN"),
    *(HOSTILE_NUMBERS, [HUGE] * 3, list(range(3)), "off", "auto", "svd"),
    *HOSTILE_NAMES,
    *HOSTILE_NUMBERS,
)


def spots(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a tree of mappings and lists, the root's first."""
    found = [path]
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree if isinstance(tree, list) else ())
    )
    for key, value in items:
        found += spots(value, (*path, key))
    return found


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    tree: list[Any] = []
    for _ in range(depth):
        tree = [tree]
    return tree


def _alike(value: Any) -> tuple[Any, ...]:
    """Hostile values of the type of one: what a check of types alone lets through."""
    if isinstance(value, bool) or value is None:
        return (True, False, None, 0)
    if isinstance(value, int):
        return (0, 1, -1, value + 1, value - 1, 10**9, 2**31, 2**53, 2**63 - 1, 2**64, HUGE)
    if isinstance(value, float):
        return (0.0, -0.0, -1.0, 1e-320, 1e308, -1e308, value / 2, *HOSTILE_NUMBERS[-3:])
    if isinstance(value, str):
        return HOSTILE_NAMES
    if isinstance(value, list):
        return ([], value[:1], value[1:], value * 2, value[::-1])
    return ({}, *({key: value[key]} for key in list(value)[:3]))


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """A tree with one to three values changed, left out, renamed, or new ones beside them."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        paths = spots(tree)[1:]
        if not paths:
            return tree
        *parents, last = draw(st.sampled_from(paths))
        place = tree
        for key in parents:
            place = place[key]
        edit = draw(st.sampled_from(("set", "alike", "alike", "delete", "rename", "add", "twice")))
        if edit == "alike":
            place[last] = copy.deepcopy(draw(st.sampled_from(_alike(place[last]))))
        elif edit == "set":
            place[last] = copy.deepcopy(draw(st.sampled_from(HOSTILE_VALUES)))
        elif edit == "delete":
            del place[last]
        elif edit == "twice":
            place[last] = [place[last], place[last]]
        elif isinstance(place, dict):
            name = draw(st.sampled_from(HOSTILE_NAMES))
            place[name] = place.pop(last) if edit == "rename" else copy.deepcopy(place[last])
        else:
            place.append(copy.deepcopy(place[last]))
    return tree


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a few flipped, cut off, put in or written over."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(found)))
        edit = draw(st.sampled_from(("flip", "flip", "cut", "insert", "write", "drop")))
        if edit == "cut":
            del found[place:]
        elif edit == "drop":
            del found[place : place + draw(st.integers(1, 16))]
        elif edit == "insert":
            found[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif edit == "write":
            some = draw(st.binary(min_size=1, max_size=16))
            found[place : place + len(some)] = some
        elif place < len(found):
            found[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(found)


def header_of(content: bytes) -> dict[str, Any]:
    """Header of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    return header


def with_header(content: bytes, header: Any, length: int | None = None) -> bytes:
    """A safetensors file with another header, which may lie about its own length."""
    size = int.from_bytes(content[:8], "little")
    text = as_json(header)
    text += b" " * (-len(text) % 8)
    said = len(text) if length is None else length
    return said.to_bytes(8, "little") + text + content[8 + size :]


def as_json(tree: Any) -> bytes:
    """JSON as Python writes it, with NaN and lone surrogates."""
    return json.dumps(tree).encode()


@st.composite
def spoiled_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with its bytes or its header spoiled."""
    kind = draw(st.sampled_from(("bytes", "header", "header", "length")))
    if kind == "bytes":
        return draw(spoiled(content))
    header = header_of(content)
    if kind == "length":
        lengths = (0, 1, 7, len(content), 10**8, 2**31, 2**63, 2**64 - 1)
        return with_header(content, header, draw(st.sampled_from(lengths)))
    return with_header(content, draw(mutated(header)))
