"""A healed folder: nearer to the dense model, as large, and never worse on held-out text."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

import slimrank
from slimrank import LowRankLinear, TokenWindows, compress, heal, quantize
from slimrank.checkpoint import read_folder, read_healing, weight_file_bytes
from slimrank.errors import (
    CheckpointError,
    ModelError,
    NumericalError,
    NumericalWarning,
    RecipeError,
    TextError,
)
from slimrank.exporting import export_dense
from slimrank.nn import cache_bytes
from tiny.folders import edit_weights, logits_of

QUIET = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")


def divergence_of(folder, teacher, windows):
    """By plain code: whole logits, mean over tokens."""
    models = [slimrank.load(path, dtype="auto") for path in (teacher, folder)]
    total = 0.0
    for window in windows:
        aim, found = (logits_of(m, window[None]).double().log_softmax(-1) for m in models)
        total += float((aim.exp() * (aim - found)).sum())
    return total / sum(map(len, windows))


def tensors_of(folder):
    return slimrank.load(folder, dtype="auto").state_dict()


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@QUIET
def test_every_family_takes_a_step(family, make_small, run, tmp_path):
    folder = make_small(family)
    report = run(folder, settings={"batch_sequences": 12})
    assert [check.step for check in report.checks] == [0, 1]
    assert report.kept_step == report.steps == 1
    assert report.divergence < report.checks[0].divergence
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    factors = {n for n in before if ".latent." in n or ".expand." in n}
    assert factors <= changed
    assert not any(before[n].ndim > 1 for n in changed - factors)
    assert any("norm" in name for name in changed)


def test_it_is_nearer_to_the_dense_model(run, small, text, tmp_path):
    report = run(settings={"epochs": 4, "learning_rate": 1e-2})
    teacher, held_out = read_folder(small).report.model, text.windows[-4:]
    before, after = (divergence_of(f, teacher, held_out) for f in (small, tmp_path / "out"))
    assert after < 0.9 * before
    assert report.checks[0].divergence == pytest.approx(before, rel=1e-5)
    assert report.divergence == pytest.approx(after, rel=1e-5)
    assert report.divergence == min(check.divergence for check in report.checks)
    own = slimrank.evaluation.perplexity(
        slimrank.load(tmp_path / "out"), torch.cat(held_out), sequence_length=20
    )
    assert report.perplexity == pytest.approx(own.value, rel=1e-5)
    dense = slimrank.evaluation.perplexity(
        slimrank.load(teacher), torch.cat(held_out), sequence_length=20
    )
    assert report.teacher_perplexity == pytest.approx(dense.value, rel=1e-5)


def test_the_curve_counts_steps_and_tokens(run):
    report = run(settings={"epochs": 2, "batch_sequences": 5, "checks": 3, "patience": 9})
    assert report.steps == 6  # 5, 5 and 2 of twelve, twice
    assert [(c.step, c.tokens) for c in report.checks] == [(0, 0), (2, 200), (4, 340), (6, 480)]
    assert (report.tokens, report.held_out_tokens) == (240, 80)
    assert report.checks[0].trained_divergence is None
    assert all(check.trained_divergence > 0 for check in report.checks[1:])
    seconds = [check.seconds for check in report.checks]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, layout, make_small, run, text, tmp_path):
    folder = make_small("qwen2", {"dtype": dtype}, layout=layout)
    report = run(folder, settings={"epochs": 2})
    teacher = read_folder(folder).report.model
    assert report.divergence < report.checks[0].divergence
    assert {
        t.dtype for t in tensors_of(tmp_path / "out").values() if t.dtype.is_floating_point
    } == {dtype}
    found = divergence_of(tmp_path / "out", teacher, text.windows[-4:])
    assert report.divergence == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_cache_of_latents_stays_one(family, make_small, run, probe, tmp_path):
    folder = make_small(family, kv_cache={"keep": 0.5})
    report = run(folder)
    assert report.kept_step > 0
    caches = []
    for path in (folder, tmp_path / "out"):
        model = slimrank.load(path)
        cache = model(input_ids=probe, use_cache=True).past_key_values
        caches.append(cache_bytes(cache))
        expected = logits_of(model, probe)[:, -1]
        first = model(input_ids=probe[:, :-1], use_cache=True).past_key_values
        again = model(input_ids=probe[:, -1:], past_key_values=first).logits[:, -1]
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    assert caches[0] == caches[1]
    assert read_folder(tmp_path / "out").report.kv_cache == read_folder(folder).report.kv_cache


def test_where_nothing_improves_the_folder_stays_as_it_was(run, small, tmp_path, measured):
    """Weights have moved, and each look at the held-out text is worse than the one before."""
    measured(1.0, 1.1, 1.2, 1.0)
    with pytest.warns(NumericalWarning, match="nothing was better on the held-out"):
        report = run(settings={"epochs": 9, "patience": 2})
    assert report.kept_step == 0
    assert len(report.checks) == 3 < report.steps
    assert report.divergence == report.checks[0].divergence == 1.0
    weights = [(f / "model.safetensors").read_bytes() for f in (small, tmp_path / "out")]
    assert weights[0] == weights[1]
    assert any("nothing was better" in warning for warning in report.warnings)
    assert "weights are as before it" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}], ids=["factors", "adapters"])
def test_what_rounding_takes_away_is_given_up(settings, make_small, run, tmp_path, measured):
    """A check of the masters was better, the stored weights are not."""
    folder = make_small("llama", {"dtype": torch.bfloat16})
    measured(1.0, 0.9, 1.0)
    with pytest.warns(NumericalWarning, match="nothing was better on the held-out"):
        report = run(folder, settings={"batch_sequences": 12, **settings})
    assert [check.divergence for check in report.checks] == [1.0, 0.9]
    assert report.kept_step == 0
    weights = [(f / "model.safetensors").read_bytes() for f in (folder, tmp_path / "out")]
    assert weights[0] == weights[1]


def test_the_best_check_is_kept_and_not_the_last(run, tmp_path, measured):
    """The weights are those of a run that ended there."""
    steady = {"warmup": 0, "final_learning_rate": 1, "batch_sequences": 12, "patience": 2}
    measured(1.0, 0.9, 0.7, 0.8, 0.8, 0.7)
    report = run(settings={"epochs": 9, **steady})
    assert (report.kept_step, len(report.checks), report.steps) == (2, 5, 9)
    measured(1.0, 0.9, 0.8, 0.8)
    assert run(out="short", settings={"epochs": 2, **steady}).kept_step == 2
    kept, ended = (tensors_of(tmp_path / name) for name in ("out", "short"))
    assert all(torch.equal(kept[name], ended[name]) for name in kept)


def test_batches_and_lengths_do_not_matter(run, make_windows, tmp_path):
    short = make_windows(8, 9, seed=1).windows
    mixed = TokenWindows((*make_windows(8, 20).windows, *short))
    curves = []
    for size in (1, 3, 8):
        report = run(out=f"out{size}", windows=mixed, batch_size=size)
        curves.append([check.divergence for check in report.checks])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0] == pytest.approx(curves[2], rel=1e-4)


def test_orders_are_drawn_from_the_seed(run):
    curves = [
        [c.divergence for c in run(out=f"out{n}", settings={"seed": seed}).checks]
        for n, seed in enumerate((0, 0, 1))
    ]
    assert curves[0] == curves[1] != curves[2]


def test_what_is_written(run, small, tmp_path):
    report, out = run(), tmp_path / "out"
    contents, before = read_folder(out), read_folder(small)
    assert contents.healing == report == read_healing(out)
    assert before.healing is None
    assert contents.report_fits
    assert contents.size == before.size
    assert contents.ranks == before.ranks
    assert contents.report.linears == before.report.linears
    assert report.weight_bytes == weight_file_bytes(out) == weight_file_bytes(small)
    (remark,) = set(contents.report.warnings) - set(before.report.warnings)
    assert "trained end to end" in remark
    assert remark in (out / "README.md").read_text()
    assert (out / "recipe.yaml").read_bytes() == (small / "recipe.yaml").read_bytes()
    assert set(left(out)) == {*left(small), "heal.json"}
    vocabularies = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (small, out)]
    assert vocabularies[0] == vocabularies[1]
    assert left(tmp_path) == ["out"]


def test_what_comes_after(run, tmp_path):
    """It can be rounded, healed again and exported; what describes factors goes with them."""
    run()
    quantize(tmp_path / "out", tmp_path / "int8")
    assert read_folder(tmp_path / "int8").healing == read_healing(tmp_path / "out")
    again = run(tmp_path / "out", "again")
    assert again.checks[0].divergence == pytest.approx(read_healing(tmp_path / "out").divergence)
    assert read_folder(tmp_path / "again").healing == again
    export_dense(tmp_path / "out", tmp_path / "dense")
    assert not (tmp_path / "dense" / "heal.json").exists()


def test_without_a_report_the_teacher_is_named(run, small, tmp_path):
    bare, dense = tmp_path / "bare", read_folder(small).report.model
    shutil.copytree(small, bare)
    (bare / "report.json").unlink()
    with pytest.raises(RecipeError, match="name it by --teacher"):
        run(bare)
    report = run(bare, teacher=dense)
    assert report.teacher == dense
    assert not (tmp_path / "out" / "report.json").exists()


def edited_report(folder, out, model):
    shutil.copytree(folder, out)
    values = json.loads((out / "report.json").read_text())
    values["model"] = str(model)
    (out / "report.json").write_text(json.dumps(values))
    return out


def test_a_teacher_that_is_not_the_one(run, small, make_folder, tmp_path):
    gone = edited_report(small, tmp_path / "a", tmp_path / "gone")
    with pytest.raises(ModelError, match=r"no such model folder: .*gone; name the dense model"):
        run(gone)
    other = edited_report(small, tmp_path / "b", make_folder("llama", seed=3))
    with pytest.raises(ModelError, match="has other embeddings; name the dense model"):
        run(other)
    with pytest.raises(ModelError, match="compressed already"):
        run(teacher=small)
    with pytest.raises(ModelError, match=r"tells 97 tokens apart, and .* 96"):
        run(teacher=make_folder("qwen2", vocab_size=97))
    assert left(tmp_path) == ["a", "b"]


def test_another_model_of_the_vocabulary_may_teach(run, make_folder):
    larger = make_folder("qwen2", num_hidden_layers=3)
    report = run(teacher=larger)
    assert report.divergence < report.checks[0].divergence


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"windows": None}, RecipeError, "no text to heal on"),
        ({"windows": TokenWindows((torch.arange(4, 9),))}, TextError, "has one sequence"),
        ({"windows": TokenWindows((torch.tensor([5]),) * 3)}, TextError, "at least 2 tokens"),
        ({"windows": TokenWindows((torch.arange(90, 97),) * 3)}, TextError, "token id 96 is out"),
        ({"device": "cuda:99"}, ModelError, "cannot use device cuda:99"),
    ],
)
def test_what_is_refused(change, error, message, run, tmp_path):
    with pytest.raises(error, match=message):
        run(**change)
    assert not left(tmp_path)


def test_folders_that_are_refused(
    run, compressed_folder, dense_folder, make_folder, make_recipe, windows, tmp_path
):
    quantize(compressed_folder, tmp_path / "int8")
    whole = tmp_path / "whole"
    compress(make_folder("llama"), make_recipe(1.0, method="svd"), out=whole, windows=windows)
    damaged = tmp_path / "damaged"
    shutil.copytree(compressed_folder, damaged)
    edit_weights(damaged, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    before = left(tmp_path)
    for folder, error, message in (
        (tmp_path / "int8", CheckpointError, "in eight bits, which cannot be trained; heal the"),
        (dense_folder, CheckpointError, "not compressed by slimrank"),
        (whole, CheckpointError, "not compressed by slimrank"),
        (damaged, NumericalError, "NaN or infinite weights"),
        (tmp_path / "gone", CheckpointError, "gone"),
    ):
        with pytest.raises(error, match=message):
            run(folder)
    with pytest.raises(CheckpointError, match="exists already"):
        run(out="int8")
    assert left(tmp_path) == before


def test_a_folder_without_factors_is_refused(run, small, tmp_path, monkeypatch):
    """As of projections that were only taken apart for a cache."""
    bare = read_folder(small).model_copy(update={"ranks": {}})
    monkeypatch.setattr("slimrank.healing.opening.read_folder", lambda _: bare)
    with pytest.raises(RecipeError, match="has no factors to heal, only dense linears"):
        run()
    assert not left(tmp_path)


def test_a_loss_that_stops_being_finite(run, tmp_path):
    with pytest.raises(NumericalError, match=r"not finite.*nothing was written; try a smaller"):
        run(settings={"learning_rate": 1e30, "epochs": 3})
    assert not left(tmp_path)


def test_weights_that_leave_their_dtype(make_small, run, tmp_path, measured):
    """Float16 ends at 65504, float32 masters do not; whatever the checks say."""
    folder = make_small("llama", {"dtype": torch.float16})
    measured(1.0, 0.9)
    with pytest.raises(NumericalError, match=r"left the range of torch\.float16.*learning rate"):
        run(
            folder,
            settings={
                "learning_rate": 1e6,
                "warmup": 0,
                "epochs": 1,
                "checks": 1,
                "batch_sequences": 12,
            },
        )
    assert not left(tmp_path)


def test_linears_that_stayed_dense_are_left_alone(make_small, run, tmp_path):
    folder = make_small("qwen2", ignore=["down_proj", "q_proj"])
    run(folder)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    for name in before:
        if "down_proj" in name or "q_proj" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(before[name], after[name]), name
    biases = [n for n in before if n.endswith("k_proj.bias")]
    assert biases
    assert all(not torch.equal(before[n], after[n]) for n in biases)
    model = slimrank.load(tmp_path / "out")
    assert any(isinstance(m, LowRankLinear) for m in model.modules())


def test_text_of_a_file(small, text_file, make_settings, tmp_path):
    recipe = make_settings(source=(str(text_file),), num_sequences=8, sequence_length=32)
    report = heal(small, tmp_path / "out", recipe)
    assert (report.tokens, report.held_out_tokens) == (8 * 32, 4 * 32)
    every = make_settings(source=(str(text_file),), sequence_length=500)
    report = heal(small, tmp_path / "every", every)
    assert report.tokens == (8000 // 500 - 4) * 500
    assert report.warnings == ()
