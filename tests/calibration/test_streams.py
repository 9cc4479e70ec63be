"""Sequences put together in any number give what each gives alone, for every family."""

import pytest
import torch
from torch import nn

from slimrank import TokenWindows
from slimrank.calibration import ORIGINAL, SHIFTED, ActivationStore, embed_streams, stacked
from slimrank.errors import ModelError
from slimrank.model import Anatomy, discover
from tolerances import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")
CLOSE = TOLERANCE["forward", torch.float32]


def drawn(*lengths):
    generator = torch.Generator().manual_seed(3)
    return TokenWindows(
        tuple(torch.randint(4, 96, (length,), generator=generator) for length in lengths)
    )


def embedded(model, calibration, held_out=None, size=3, store=None, anatomy=None):
    anatomy = anatomy or discover(model, torch.arange(12)[None])
    return embed_streams(
        model, anatomy, calibration, held_out, size, ActivationStore() if store is None else store
    )


@torch.no_grad()
def states_of(model, window):
    """Input of each block, and output of the last, when the model takes a window alone."""
    ends = []
    *_, blocks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    handle = blocks[-1].register_forward_hook(lambda _m, _a, output: ends.append(output))
    output = model(input_ids=window[None], use_cache=False, output_hidden_states=True)
    handle.remove()
    end = ends[0][0] if isinstance(ends[0], tuple) else ends[0]
    return list(blocks), [state[0] for state in (*output.hidden_states[:-1], end)]


@torch.no_grad()
def run(block, index, streams, numbers, inputs):
    args, kwargs = streams.call(index, numbers)
    output = block(torch.stack(inputs), *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= CLOSE * wanted.norm()


def assert_any_grouping_is_right(model, windows, streams):
    """Each block, given the model's own states in groups, gives what the model gives."""
    blocks, _ = states_of(model, windows.windows[0])
    known = [states_of(model, window)[1] for window in windows.windows]
    count = len(known)
    groupings = [[[n] for n in range(count)], [list(range(count))], [list(reversed(range(count)))]]
    groupings += [[list(range(s, min(s + k, count))) for s in range(0, count, k)] for k in (2, 3)]
    for grouping in groupings:
        for numbers in grouping:
            for index, block in enumerate(blocks):
                found = run(block, index, streams, numbers, [known[n][index] for n in numbers])
                for row, number in zip(found, numbers, strict=True):
                    assert_close(row, known[number][index + 1])


def test_any_grouping_gives_what_the_model_gives(family, make_model):
    model = make_model(family)
    windows = drawn(*[24] * 5)
    streams = embedded(model, windows)
    assert len(streams.kinds) == 1
    assert streams.kinds[0].double is not None
    assert_any_grouping_is_right(model, windows, streams)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("falcon", {"alibi": True}),
        ("llama", {"attn_implementation": "eager"}),
        ("gemma3", {"attn_implementation": "eager"}),
    ],
)
def test_masks_and_biases_that_grow_with_the_batch(make_model, family, overrides):
    model = make_model(family, **overrides)
    windows = drawn(*[24] * 4)
    streams = embedded(model, windows)
    tensors = [
        v for v in streams.call(0, [0, 1, 2])[1].values() if isinstance(v, torch.Tensor) and v.ndim
    ]
    assert 3 in {len(tensor) for tensor in tensors}
    assert_any_grouping_is_right(model, windows, streams)


def test_experts_in_a_list(make_experts_model):
    model, windows = make_experts_model(), drawn(*[24] * 4)
    assert_any_grouping_is_right(model, windows, embedded(model, windows))


def test_both_streams_begin_with_the_models_embeddings(family, make_model):
    model = make_model(family)
    calibration, held_out = drawn(24, 9, 24), drawn(24, 13)
    streams = embedded(model, calibration, held_out)
    for number, window in enumerate((*calibration.windows, *held_out.windows)):
        wanted = states_of(model, window)[1][0]
        assert torch.equal(streams.store.get((ORIGINAL, number)), wanted)
        assert torch.equal(streams.store.get((SHIFTED, number)), wanted)


def test_held_out_sequences_come_after_calibration(make_model):
    model = make_model("llama")
    streams = embedded(model, drawn(24, 9, 24), drawn(13, 24))
    assert (streams.calibration, streams.held_out) == (range(3), range(3, 5))
    assert (streams.num_calibration, streams.lengths) == (3, (24, 9, 24, 13, 24))
    alone = embedded(model, drawn(24, 9))
    assert (alone.calibration, alone.held_out) == (range(2), range(2, 2))
    assert (ORIGINAL, 2) not in alone.store


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_lengths_are_never_mixed(make_model, size):
    model = make_model("mistral")
    streams = embedded(model, drawn(24, 9, 24, 24, 9, 31, 24), size=size)
    groups = list(streams.groups(range(7)))
    assert sorted(n for group in groups for n in group) == list(range(7))
    assert all(len({streams.lengths[n] for n in group}) == 1 for group in groups)
    assert max(map(len, groups)) == min(size, 4)
    assert [n for group in groups for n in group if streams.lengths[n] == 24] == [0, 2, 3, 6]
    assert len(streams.kinds) == 3
    for group in groups:
        assert stacked(streams.store, (SHIFTED,), group).shape[0] == len(group)


@pytest.mark.parametrize("family", ["gemma2", "opt", "falcon"])
def test_unequal_lengths_each_get_arguments_of_their_own(family, make_model):
    model, windows = make_model(family), drawn(24, 9, 24, 9, 40)
    streams = embedded(model, windows)
    groups = list(streams.groups(range(5)))
    assert groups == [[0, 2], [1, 3], [4]]
    for numbers in groups:
        known = [states_of(model, windows.windows[number]) for number in numbers]
        for index, block in enumerate(known[0][0]):
            found = run(block, index, streams, numbers, [states[index] for _, states in known])
            for row, (_, states) in zip(found, known, strict=True):
                assert_close(row, states[index + 1])


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("lengths", [(24,), (24, 24), (24,) * 7, (24, 9, 24, 24, 9)])
@pytest.mark.parametrize("others", [(), (24,), (24, 9, 24, 24)])
def test_a_walk_takes_each_sequence_once_and_the_last_alone(make_model, size, lengths, others):
    streams = embedded(make_model("llama"), drawn(*lengths), drawn(*others) if others else None)
    walk = list(streams.walk())
    last = len(lengths) - 1
    assert sorted(n for numbers in walk for n in numbers) == list(range(len(lengths + others)))
    assert [last] in walk
    place = walk.index([last])
    assert all(max(numbers) < last for numbers in walk[:place])
    assert all(min(numbers) > last for numbers in walk[place + 1 :])
    assert all(len(numbers) <= streams.size for numbers in walk)


def test_a_store_on_disk_gives_the_same_bits(make_model, tmp_path):
    model, windows = make_model("qwen3"), drawn(*[24] * 4)
    with ActivationStore() as memory, ActivationStore(0, tmp_path) as disk:
        held = embedded(model, windows, store=memory)
        embedded(model, windows, store=disk)
        assert disk.bytes_in_memory == 0
        assert disk.bytes_on_disk == memory.bytes_in_memory == 2 * 4 * 24 * 32 * 4
        for numbers in held.walk():
            for kind in (ORIGINAL, SHIFTED):
                left, right = (stacked(s, (kind,), numbers) for s in (memory, disk))
                assert torch.equal(left, right)
    assert list(tmp_path.iterdir()) == []


class Block(nn.Module):
    """Scales its input by what it is called with."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states, given):
        return hidden_states + self.linear(hidden_states) * given


class Told(nn.Module):
    """Tells its blocks something about the tokens."""

    def __init__(self, tell):
        super().__init__()
        self.tell = tell
        self.embed = nn.Embedding(96, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids, use_cache=False, output_hidden_states=False):
        hidden = self.embed(input_ids)
        for block in self.layers:
            hidden = block(hidden, given=self.tell(input_ids))
        return (hidden,)


TOLD = {
    "a number that grows": lambda ids: len(ids),
    "a value that grows": lambda ids: torch.tensor(float(len(ids))),
    "values that grow": lambda ids: torch.full((len(ids), 1, 1), float(len(ids))),
    "an axis behind that grows": lambda ids: torch.full((1, len(ids)), 2.0),
    "an axis that grows faster": lambda ids: torch.full((len(ids) ** 2, 1, 1), 2.0),
    "not the same for each": lambda ids: torch.arange(1.0, len(ids) + 1)[:, None, None],
}


@pytest.mark.parametrize("tell", TOLD)
def test_what_cannot_be_put_together_is_run_alone(tell):
    model, windows = Told(TOLD[tell]), drawn(*[20] * 4)
    streams = embedded(model, windows, anatomy=Anatomy("layers", ((), ()), None))
    assert [kind.double for kind in streams.kinds] == [None]
    assert list(streams.walk()) == [[0], [1], [2], [3]]
    with torch.no_grad():
        for number, window in enumerate(windows.windows):
            states = streams.store.get((ORIGINAL, number))[None]
            for index, block in enumerate(model.layers):
                args, kwargs = streams.call(index, [number])
                states = block(states, *args, **kwargs)
            assert torch.equal(states, model(window[None])[0])


def test_only_sequences_that_are_called_alike_are_put_together():
    """Blocks are told the first token: those of one beginning and one length go together."""
    model = Told(lambda ids: ids[:, :1, None].float() / 50)
    rows = [[5, 6, 7], [9, 6, 7], [5, 8, 8], [9, 1, 2], [5, 1, 1], [5, 6, 7, 8], [7, 7, 7]]
    windows = TokenWindows(tuple(map(torch.tensor, rows)))
    streams = embedded(model, windows, anatomy=Anatomy("layers", ((), ()), None))
    assert list(streams.groups(range(7))) == [[0, 2, 4], [1, 3], [5], [6]]
    assert streams.call(1, [0, 2, 4])[1]["given"].flatten().tolist() == pytest.approx([0.1] * 3)
    assert streams.call(0, [1, 3])[1]["given"].shape == (2, 1, 1)
    assert [kind.double is None for kind in streams.kinds] == [False, False, True, True]


def test_a_model_that_leaves_blocks_out_is_refused(make_model):
    model = make_model("llama")
    anatomy = discover(model, torch.arange(12)[None])
    model.config.num_hidden_layers = 1
    with pytest.raises(ModelError, match="LlamaForCausalLM passes more than hidden states"):
        embedded(model, drawn(24, 24), anatomy=anatomy)


def test_lengths_are_told_apart_even_where_blocks_are_not_told():
    model = Told(lambda ids: 2.0)
    streams = embedded(model, drawn(9, 8, 9, 8), anatomy=Anatomy("layers", ((), ()), None))
    assert list(streams.groups(range(4))) == [[0, 2], [1, 3]]
    assert stacked(streams.store, (ORIGINAL,), [1, 3]).shape == (2, 8, 8)
