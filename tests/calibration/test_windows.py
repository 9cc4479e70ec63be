"""Windows of tokens: drawn apart from each other, by a seed; no padding in them, ever."""

import pytest
import torch

from slimrank import TokenWindows
from slimrank.calibration import default_batch_size, draw_windows, from_padded, hold_out
from slimrank.errors import NumericalWarning, TextError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("tokens", "count", "length"), [(100, 5, 7), (103, 10, 10), (64, 1, 64)])
def test_drawn_windows_are_disjoint_pieces_of_the_text(tokens, count, length, seed):
    windows = draw_windows(torch.arange(tokens), count, length, seeded(seed)).windows
    assert len(windows) == count
    for window in windows:
        assert torch.equal(window, torch.arange(length) + window[0])
    assert len(torch.cat(windows).unique()) == count * length


def test_the_seed_decides():
    ids = torch.arange(1000)
    draws = [draw_windows(ids, 8, 20, seeded(seed)).fingerprint() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    draw_windows(torch.arange(100), 3, 10, seeded())
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_offset_is_drawn():
    offsets = {
        int(draw_windows(torch.arange(13), 1, 10, seeded(seed)).windows[0][0]) for seed in range(60)
    }
    assert offsets == {0, 1, 2, 3}


def test_windows_do_not_hold_on_to_the_text():
    ids = torch.arange(100)
    windows = draw_windows(ids, 2, 10, seeded())
    before = windows.fingerprint()
    ids.zero_()
    assert windows.fingerprint() == before


def test_a_short_text_gives_all_of_it_with_a_warning():
    with pytest.warns(NumericalWarning, match="the text holds 3 sequences of 10 tokens; 8 were"):
        windows = draw_windows(torch.arange(35), 8, 10, seeded())
    assert windows.tokens == 30


def test_a_text_shorter_than_a_window_is_an_error():
    with pytest.raises(TextError, match="has 9 tokens, fewer than one sequence of 10"):
        draw_windows(torch.arange(9), 1, 10, seeded())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32])
def test_padding_is_cut_off(side, kind):
    texts = [[5, 6, 7, 8], [0, 9], [4, 0, 0]]  # 0 is a token here too
    ids, mask = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4, dtype=kind)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(4 - len(text), 4)
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    assert [w.tolist() for w in from_padded(ids, mask).windows] == texts


def test_without_a_mask_rows_are_windows():
    ids = torch.arange(6).reshape(2, 3)
    assert [w.tolist() for w in from_padded(ids).windows] == ids.tolist()


def test_a_row_of_padding_only_is_an_error():
    with pytest.raises(TextError, match="empty"):
        from_padded(torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 0, 0]]))


def test_tokenizer_padding_is_understood(tiny_tokenizer):
    texts = ["a short one", "one that is longer than that"]
    for side in ("left", "right"):
        tiny_tokenizer.padding_side = side
        padded = tiny_tokenizer(texts, padding=True, return_tensors="pt")
        windows = from_padded(padded["input_ids"], padded["attention_mask"])
        assert [w.tolist() for w in windows.windows] == tiny_tokenizer(texts)["input_ids"]


def test_no_windows_is_an_error():
    with pytest.raises(TextError):
        TokenWindows(())


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_batches_hold_each_window_once_and_one_length_each(size):
    lengths = [3, 5, 3, 4, 5, 3, 3]
    windows = TokenWindows(tuple(torch.full((n,), i) for i, n in enumerate(lengths)))
    batches = list(windows.batches(size))
    assert all(1 <= len(batch) <= size for batch in batches)
    rows = [(int(row[0]), len(row)) for batch in batches for row in batch]
    assert sorted(rows) == list(enumerate(lengths))
    assert [batch.shape[1] for batch in batches] == sorted(b.shape[1] for b in batches)


def test_fingerprint_knows_ids_and_cuts():
    def of(*windows):
        return TokenWindows(tuple(map(torch.tensor, windows))).fingerprint()

    base = of([1, 2, 3], [4, 5])
    assert base == of([1, 2, 3], [4, 5])
    others = [
        of([1, 2, 3], [4, 6]),
        of([1, 2], [3, 4, 5]),
        of([1, 2, 3, 4, 5]),
        of([4, 5], [1, 2, 3]),
    ]
    assert len({base, *others}) == 5
    narrow = TokenWindows(tuple(torch.tensor(w, dtype=torch.int32) for w in ([1, 2, 3], [4, 5])))
    assert narrow.fingerprint() == base


@pytest.mark.parametrize(("ids", "bad"), [([1, 96], "96"), ([200, 3], "200"), ([5, -1], "-1")])
def test_tokens_outside_the_vocabulary_are_named(ids, bad):
    windows = TokenWindows((torch.tensor([1, 2]), torch.tensor(ids)))
    with pytest.raises(TextError, match=f"token id {bad} is outside the model's 96 embeddings"):
        windows.check_vocabulary(96)


def test_the_last_token_of_the_vocabulary_is_inside():
    TokenWindows((torch.tensor([0, 95]),)).check_vocabulary(96)


@pytest.mark.parametrize(("length", "size"), [(1, 4096), (2048, 2), (4096, 1), (100_000, 1)])
def test_default_batch_size(length, size):
    assert default_batch_size(length) == size


@pytest.mark.parametrize(
    ("windows", "asked", "parted"),
    [(9, 3, 3), (9, 0, 0), (9, 8, 4), (2, 8, 1), (1, 8, 0), (1, 0, 0), (8, 4, 4)],
)
def test_the_last_are_held_out_and_at_most_a_half(windows, asked, parted):
    every = TokenWindows(tuple(torch.tensor([n, n]) for n in range(windows)))
    kept, held_out = hold_out(every, asked)
    assert [int(w[0]) for w in kept.windows] == list(range(windows - parted))
    rest = [] if held_out is None else [int(w[0]) for w in held_out.windows]
    assert rest == list(range(windows - parted, windows))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_held_out_is_elsewhere_in_the_text(seed):
    kept, held_out = hold_out(draw_windows(torch.arange(300), 12, 20, seeded(seed)), 5)
    starts = [[int(w[0]) for w in part.windows] for part in (kept, held_out)]
    assert all(abs(a - b) >= 20 for a in starts[0] for b in starts[1])
