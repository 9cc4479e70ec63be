"""A folder that reaches out of itself, brings code or claims to be huge is refused unbuilt."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import slimrank
from slimrank.checkpoint import own_file, read_folder, read_headers, require_sound
from slimrank.checkpoint.sound import own_weight_files, require_sound_config
from slimrank.errors import CheckpointError, ModelError, TextError
from slimrank.planning import plan
from slimrank.source import load_model, load_skeleton, load_tokenizer, parse_source

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def dense(dense_folder, tmp_path):
    return shutil.copytree(dense_folder, tmp_path / "dense")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def name_weights(folder, name):
    """Let an index name the weights."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name)})
    (folder / INDEX).write_text(text)
    return tensors


def test_sound_folders_pass(dense, copied):
    require_sound(dense)
    require_sound(copied)
    assert own_weight_files(copied) == [copied / FILE]


@pytest.mark.parametrize("name", ["part.safetensors", "parts/part.safetensors"])
def test_an_index_may_name_what_is_in_the_folder(dense, name):
    (dense / "parts").mkdir()
    save_file(name_weights(dense, name), dense / name, metadata={"format": "pt"})
    require_sound(dense)
    assert slimrank.load(dense).config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["../out.safetensors", "ABSOLUTE"])
def test_an_index_may_not_name_what_is_elsewhere(dense, tmp_path, name):
    out = tmp_path / "out.safetensors"
    save_file(
        name_weights(dense, name.replace("ABSOLUTE", str(out))), out, metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="lies outside of it"):
        slimrank.load(dense)
    with pytest.raises(ModelError, match="lies outside of it"):
        load_model(parse_source(dense))


@pytest.mark.parametrize("name", [3, None, ["a"], "a\0b", "x" * 5_000, "missing.safetensors"])
def test_names_of_files_that_cannot_be(dense, name):
    with pytest.raises(CheckpointError, match=r"names a file that cannot be|lacks"):
        own_file(dense, name)


@pytest.mark.parametrize(
    "text", ["[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}']
)
def test_an_index_that_is_none(dense, text):
    (dense / FILE).unlink()
    (dense / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="is no index of weight files"):
        require_sound(dense)


@pytest.mark.parametrize("text", ["{", '{"weight_map": {"a": "../gone.safetensors"}}'])
def test_a_stale_index_beside_the_weights(dense, text):
    (dense / INDEX).write_text(text)
    assert own_weight_files(dense) == [dense / FILE]
    assert slimrank.load(dense).config.num_hidden_layers == 2


def test_other_weights_beside_shards(dense):
    save_file(name_weights(dense, "part.safetensors"), dense / "part.safetensors", {"format": "pt"})
    (dense / "consolidated.safetensors").write_bytes(b"torn")
    assert own_weight_files(dense) == [dense / "part.safetensors"]
    assert slimrank.load(dense).config.num_hidden_layers == 2


def test_weights_of_other_names(dense):
    (dense / FILE).rename(dense / "b.safetensors")
    save_file({}, dense / "a.safetensors")
    assert own_weight_files(dense) == [dense / "a.safetensors", dense / "b.safetensors"]


@pytest.mark.parametrize("place", ["", "text_config"])
def test_weights_that_the_configuration_names(dense, place):
    """transformers takes them instead, and their index may reach out."""
    named = {"transformers_weights": "other.safetensors.index.json"}
    change(dense, **({place: named} if place else named))
    index = {"weight_map": {"a": "../out.safetensors"}}
    (dense / "other.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names \.\./out.safetensors, which lies outside"):
        slimrank.load(dense)
    index = {"weight_map": {"a": "other.safetensors"}}
    (dense / "other.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(dense / FILE, dense / "other.safetensors")
    assert own_weight_files(dense) == [dense / FILE, dense / "other.safetensors"]


def test_links_to_weights_elsewhere_are_followed(copied, tmp_path):
    """A view of a shared store; what is copied must lie in the folder itself."""
    (copied / FILE).rename(tmp_path / FILE)
    (copied / FILE).symlink_to(tmp_path / FILE)
    assert read_folder(copied).ranks
    assert slimrank.load(copied).config.num_hidden_layers == 2
    with pytest.raises(CheckpointError, match=f"names {FILE}, which lies outside of it"):
        own_file(copied, FILE)


@pytest.mark.parametrize("to", ["/dev/zero", "."])
def test_links_to_what_is_no_file(dense, to):
    (dense / FILE).unlink()
    (dense / FILE).symlink_to(to)
    with pytest.raises(CheckpointError, match="names a file that cannot be"):
        require_sound(dense)


@pytest.mark.parametrize("is_link", [True, False])
def test_links_of_a_hub_cache_are_followed(dense, tmp_path, is_link):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    if is_link:
        (tmp_path / "store").mkdir()
        blobs.symlink_to(tmp_path / "store")
    else:
        blobs.mkdir()
    for path in dense.iterdir():
        path.rename(blobs / f"hash-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-of-{path.name}")
    assert own_file(snapshot, FILE) == snapshot / FILE
    assert slimrank.load(snapshot).config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers 1000000000, and the weight files"),
        ({"num_hidden_layers": 257}, "says num_hidden_layers 257"),
        ({"text_config": {"n_layers": 10**9}}, "says n_layers"),
        ({"num_local_experts": 10**9}, "says num_local_experts"),
        ({"attn_implementation": "somebody/kernels"}, "names code to run in attn_implementation"),
        ({"x": [{"_attn_implementation": {"": "a/b"}}]}, "names code to run in _attn"),
    ],
)
def test_configurations_refused_by_their_text_alone(dense, values, message):
    change(dense, **values)
    with pytest.raises(CheckpointError, match=message):
        slimrank.load(dense)
    with pytest.raises(ModelError, match=message):
        load_model(parse_source(dense))
    with pytest.raises(ModelError, match=message):
        load_skeleton(parse_source(dense))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 10**7}, r"has shape \(96, 32\), .*config\.json says \(10000000, 32\)"),
        ({"intermediate_size": 10**7}, "says"),
        ({"num_hidden_layers": 250, "head_dim": 8}, r"describes \d+ parameters, the weight files"),
        ({"pad_token_id": 10**6}, "Padding_idx"),
        ({"model_type": "no_such"}, "cannot read"),
    ],
)
def test_dense_models_that_are_larger_than_their_files(dense, values, message):
    change(dense, **values)
    with pytest.raises(CheckpointError, match=message):
        require_sound(dense)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "{", "\ufeff{}"])
def test_a_configuration_that_is_none(dense, text):
    (dense / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        require_sound_config(dense)


def test_pickled_weights_are_not_read(dense):
    (dense / FILE).unlink()
    (dense / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"pickled weights \(\.bin\) are not read: convert them"):
        load_model(parse_source(dense))


def test_nobody_is_asked_whether_to_run_code(dense, monkeypatch):
    def asked(*_):
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", asked)
    names = ("AutoConfig", "AutoModelForCausalLM")
    change(dense, model_type="evil", auto_map={name: "evil.Evil" for name in names})
    (dense / "evil.py").write_text("raise SystemExit\n")
    tokens = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (dense / "tokenizer_config.json").write_text(json.dumps(tokens))
    for read in (load_model, load_skeleton):
        with pytest.raises(ModelError, match="contains custom code"):
            read(parse_source(dense))
    with pytest.raises(TextError, match="custom code"):
        load_tokenizer(parse_source(dense))


@pytest.mark.parametrize("number", [384, 512])
def test_many_experts(make_folder, make_recipe, number):
    """More than layers may be; `plan` needs the configuration alone, or beside its weights."""
    folder = make_folder("qwen3_moe", num_experts=number)
    whole = plan(folder, make_recipe())
    assert whole.linears
    require_sound(folder)
    (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1")  # is to be fetched
    assert plan(folder, make_recipe()) == whole
    (folder / FILE).unlink()
    assert plan(folder, make_recipe()) == whole


def test_more_experts_than_there_are(dense):
    change(dense, num_local_experts=512)
    with pytest.raises(CheckpointError, match="says num_local_experts 512"):
        require_sound_config(dense, read_headers([dense / FILE]))
    assert require_sound_config(dense)["num_local_experts"] == 512
    change(dense, num_local_experts=2**14 + 1)
    with pytest.raises(ModelError, match="says num_local_experts 16385"):
        load_skeleton(parse_source(dense))


def test_errors_of_a_folder_keep_their_words(dense):
    """They are one type by `load_model`, and neither cut nor put into another sentence."""
    values = {"a" * 500 + "_layers": 10**9}
    change(dense, **values)
    with pytest.raises(CheckpointError) as refused:
        require_sound(dense)
    for read in (load_model, load_skeleton):
        with pytest.raises(ModelError) as told:
            read(parse_source(dense))
        assert str(told.value) == str(refused.value)
