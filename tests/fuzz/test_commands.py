"""Commands on spoiled folders: done, or one line and exit code 1; nothing half-written beside."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimrank
from fuzz.mutation import as_json, mutated, spoiled, spoiled_tensors
from fuzz.properties import contents, examples, nothing_else_touched, put_back, run
from slimrank.checkpoint.profile import MANIFEST, SEAL


@pytest.fixture(scope="module")
def folder(spoil):
    return spoil("pivoted")


@pytest.fixture(scope="module")
def whole(folder):
    return contents(folder)


@pytest.fixture(scope="module")
def profile(dense_folder, make_recipe, windows, tmp_path_factory):
    out = tmp_path_factory.mktemp("profiles") / "profile"
    slimrank.profile(dense_folder, make_recipe(layout="auto"), out, windows=windows)
    return out


@pytest.fixture(scope="module")
def kept(profile):
    return contents(profile)


def changed(draw, whole):
    """One of the files of a compressed folder, spoiled."""
    name = draw(st.sampled_from(("config.json", "report.json", "model.safetensors")))
    if name.endswith(".json") and draw(st.booleans()):
        return name, as_json(draw(mutated(json.loads(whole[name]))))
    spoil = spoiled_tensors if name.endswith(".safetensors") else spoiled
    return name, draw(spoil(whole[name]))


@examples(10)
@given(data=st.data())
def test_inspect_and_quantize(folder, whole, tmp_path_factory, data):
    name, content = changed(data.draw, whole)
    (folder / name).write_bytes(content)
    out = tmp_path_factory.mktemp("out") / "int8"
    try:
        with nothing_else_touched(folder):
            run("inspect", folder)
            run("inspect", folder, "--json")
        run("quantize", folder, out)
        assert {path.name for path in out.parent.iterdir()} <= {"int8"}
    finally:
        put_back(folder, whole)


@examples(5)
@given(data=st.data())
def test_evaluate(folder, whole, text_file, data):
    name, content = changed(data.draw, whole)
    (folder / name).write_bytes(content)
    try:
        with nothing_else_touched(folder):
            run(
                "evaluate", folder, "--text", text_file, "--sequence-length", 32, "--num-windows", 2
            )
    finally:
        put_back(folder, whole)


@examples(3)
@given(data=st.data())
def test_analyze_and_compress_from_a_profile(profile, kept, dense_folder, tmp_path_factory, data):
    manifest = as_json(data.draw(mutated(json.loads(kept[MANIFEST]))))
    (profile / MANIFEST).write_bytes(manifest)
    (profile / SEAL).write_text(f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n")
    root = tmp_path_factory.mktemp("out")
    try:
        with nothing_else_touched(profile):
            run("analyze", profile, "--out", root / "analysis")
            flags = ("--keep", 0.5, "--effort", "fast", "--profile", profile)
            run("compress", dense_folder, root / "small", *flags)
        assert {path.name for path in root.iterdir()} <= {"analysis", "small"}
    finally:
        put_back(profile, kept)


HOSTILE_LABEL = "model.layers.0.[/red]\x1b[31m\n.[/bold]"


def test_names_are_shown_as_they_are(folder, whole):
    """Neither mark-up of tables nor a terminal's own codes are obeyed."""
    report, config = (json.loads(whole[name]) for name in ("report.json", "config.json"))
    report["linears"][0]["name"] = report["model"] = HOSTILE_LABEL
    linears = config["quantization_config"]["linears"]
    linears["model.layers.0.[/red]"] = next(iter(linears.values()))
    (folder / "report.json").write_bytes(as_json(report))
    (folder / "config.json").write_bytes(as_json(config))
    try:
        said = run("inspect", folder)
        run("report", folder, "--force")
    finally:
        put_back(folder, whole)
    assert "[/red]" in said
    assert "\x1b" not in said
