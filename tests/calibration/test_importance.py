"""Block influence against what plain forwards of transformers give, at no further forward."""

from itertools import pairwise

import pytest
import torch

from slimrank import TokenWindows, compress
from slimrank.calibration import BlockInfluence, from_padded
from slimrank.errors import CheckpointError

FAMILIES = ["llama", "gemma3", "falcon", "opt", "gpt_neox"]
CLOSE = 1e-5  # relative; cosines are taken in float32


def one_minus_cosine(entering, leaving):
    """Of each token, in float64, by definition."""
    entering, leaving = entering.double(), leaving.double()
    norms = entering.norm(dim=-1) * leaving.norm(dim=-1)
    return 1 - (entering * leaving).sum(-1) / norms


@torch.no_grad()
def plain_forwards(model, windows, path):
    """Input, output of each block by hooks, and `hidden_states`; for each window alone."""
    blocks = list(model.get_submodule(path).children())
    for window in windows.windows:
        seen = [[None, None] for _ in blocks]
        handles = []
        for number, block in enumerate(blocks):

            def before(_m, args, kwargs, place=seen[number]):
                place[0] = args[0] if args else kwargs["hidden_states"]

            def after(_m, _args, output, place=seen[number]):
                place[1] = output[0] if isinstance(output, tuple) else output

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after))
        states = model(
            input_ids=window[None], use_cache=False, output_hidden_states=True
        ).hidden_states
        for handle in handles:
            handle.remove()
        yield seen, states


def path_of(found):
    return found.manifest.linears[0].name.split(".0.")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_against_plain_forwards(family, make_model, make_profile, calibration_part):
    model = make_model(family)
    found = make_profile(model)
    blocks, authors = [], []
    for seen, states in plain_forwards(model, calibration_part, path_of(found)):
        blocks.append(torch.stack([one_minus_cosine(*pair)[0] for pair in seen]))
        steps = [one_minus_cosine(*pair)[0] for pair in pairwise(states)]
        authors.append(torch.stack(steps))
    expected = torch.cat(blocks, dim=1).mean(1).tolist()
    reported = torch.cat(authors, dim=1).mean(1).tolist()
    assert found.manifest.importance == pytest.approx(expected, rel=CLOSE)
    # What transformers calls hidden states differs in the last one only, which is after the norm.
    assert found.manifest.importance[:-1] == pytest.approx(reported[:-1], rel=CLOSE)
    assert found.manifest.importance_after_norm == pytest.approx(reported[-1], rel=CLOSE)
    assert abs(reported[-1] - expected[-1]) > 1e-3 * expected[-1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(make_model, make_profile, make_recipe, side):
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(4, 96, (n,), generator=generator) for n in (30, 12, 21, 30)]
    ids, mask = torch.zeros(4, 30, dtype=torch.int64), torch.zeros(4, 30, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(30 - len(text), 30)
        ids[row, place], mask[row, place] = text, 1
    model, recipe = make_model("llama"), make_recipe(calibration={"held_out_sequences": 0})
    padded = make_profile(model, recipe, windows=from_padded(ids, mask)).manifest
    alone = make_profile(model, recipe, windows=TokenWindows(tuple(texts))).manifest
    assert padded.tokens == 93
    assert padded.importance == alone.importance
    expected = torch.cat(
        [
            one_minus_cosine(*seen[0])[0]
            for seen, _ in plain_forwards(model, TokenWindows(tuple(texts)), "model.layers")
        ]
    )
    assert padded.importance[0] == pytest.approx(float(expected.mean()), rel=CLOSE)


def test_it_costs_no_forward_of_a_block(make_model, make_profile, make_recipe, calibration_part):
    """The MLPs run as often as in a direct run, which measures no influence."""

    def counted(work):
        model, calls = make_model("llama"), [0, 0]
        for number, block in enumerate(model.model.layers):

            def count(*_, number=number):
                calls[number] += 1

            block.mlp.register_forward_pre_hook(count)
        work(model)
        return calls

    recipe = make_recipe(calibration={"held_out_sequences": 0})
    direct = counted(lambda model: compress(model, recipe, windows=calibration_part))
    profiled = counted(lambda model: make_profile(model, recipe, windows=calibration_part))
    assert profiled == direct
    assert min(direct) > 0


def test_a_norm_that_is_followed_by_a_projection(make_model, make_profile):
    """OPT may project down behind the blocks: there is no angle between states of two widths."""
    found = make_profile(make_model("opt", word_embed_proj_dim=16))
    assert found.manifest.importance_after_norm is None
    with pytest.raises(CheckpointError, match="no importance after the final norm"):
        found.allocation_profiles(after_norm=True)


def test_lengths_do_not_count_and_directions_do():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 4, 8, generator=generator)
    for leaving, expected in ((states, 0.0), (7 * states, 0.0), (-states, 2.0)):
        influence = BlockInfluence()
        influence.add(states, leaving)
        assert influence.value == pytest.approx(expected, abs=1e-6)
        assert influence.tokens == 12


def test_it_is_a_mean_over_tokens_of_all_batches():
    influence = BlockInfluence()
    influence.add(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]))
    influence.add(torch.tensor([[[1.0, 0.0]] * 3]), torch.tensor([[[2.0, 0.0]] * 3]))
    assert influence.value == 0.25


def test_angles_of_half_precision_are_taken_in_single():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 8, 64, generator=generator).bfloat16()
    leaving = (states + 0.05 * torch.randn(2, 8, 64, generator=generator)).bfloat16()
    influence = BlockInfluence()
    influence.add(states, leaving)
    expected = float(one_minus_cosine(states, leaving).mean())  # about 1e-3
    assert influence.value == pytest.approx(expected, rel=1e-3)


def test_nothing_seen():
    assert BlockInfluence().value == 0.0
