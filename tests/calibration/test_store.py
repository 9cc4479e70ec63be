"""What is kept comes back bit by bit, from memory or disk, and nothing is left behind."""

import resource
from contextlib import contextmanager

import pytest
import torch

from slimrank.calibration import ActivationStore, stacked, together
from slimrank.errors import CheckpointError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
)
ODD = (0.0, -0.0, 1e-40, float("inf"), float("-inf"), float("nan"), 1.1)
LIMITS = (None, 0)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def filled(number, size=4):
    return torch.full((size,), float(number))


@contextmanager
def full_disk(bytes_left):
    """Let no file grow beyond a few bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def store(tmp_path):
    """Room for two tensors of four floats; the rest goes to `tmp_path`."""
    with ActivationStore(limit=32, folder=tmp_path) as made:
        yield made


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_by_bit(tmp_path, dtype, limit):
    tensor = torch.tensor(ODD).nan_to_num(7, 9, 3) if not dtype.is_floating_point else None
    tensor = (
        torch.tensor(ODD, dtype=torch.float64).to(dtype) if tensor is None else tensor.to(dtype)
    )
    with ActivationStore(limit, tmp_path) as store:
        store.put("it", tensor)
        found = store.get("it")
        assert (found.dtype, found.shape) == (dtype, tensor.shape)
        assert bits(found) == bits(tensor)
        assert len(files(tmp_path)) == (limit is not None)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 1, 3), (0, 5)])
def test_every_shape_comes_back(tmp_path, shape, limit):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with ActivationStore(limit, tmp_path) as store:
        store.put("it", tensor)
        assert torch.equal(store.get("it"), tensor)
        assert store.get("it").shape == shape


@pytest.mark.parametrize("limit", LIMITS)
def test_a_part_of_a_larger_tensor_is_kept_alone(tmp_path, limit):
    whole = torch.arange(1000.0).reshape(10, 100)
    with ActivationStore(limit, tmp_path) as store:
        store.put("row", whole[3])
        store.put("turned", whole[:, :3].mT)
        assert torch.equal(store.get("row"), whole[3])
        assert torch.equal(store.get("turned"), whole[:, :3].mT)
        held = sum(store.get(key).untyped_storage().nbytes() for key in ("row", "turned"))
        assert held == 400 + 120
        assert store.bytes_in_memory + store.bytes_on_disk == held


@pytest.mark.parametrize("limit", LIMITS)
def test_a_copy_is_kept(tmp_path, limit):
    """What happens to the tensor afterwards does not reach the store, and no graph is held."""
    tensor = torch.ones(4, requires_grad=True)
    with ActivationStore(limit, tmp_path) as store:
        store.put("it", tensor * 1)
        store.put("same", tensor)
        tensor.data.zero_()
        assert store.get("same").tolist() == [1.0] * 4
        assert not store.get("it").requires_grad


def test_what_does_not_fit_goes_to_disk(store, tmp_path):
    assert files(tmp_path) == []
    for number in range(2):
        store.put(number, filled(number))
    assert (store.bytes_in_memory, store.bytes_on_disk) == (32, 0)
    assert list(tmp_path.iterdir()) == []  # a folder is made only once it is needed
    for number in range(2, 5):
        store.put(number, filled(number))
    assert (store.bytes_in_memory, store.bytes_on_disk) == (32, 48)
    assert len(files(tmp_path)) == 3
    assert [store.get(number).tolist() for number in range(5)] == [[n] * 4 for n in range(5)]
    assert all(number in store for number in range(5))
    assert 5 not in store


def test_something_small_still_fits_after_something_large(store):
    store.put("large", filled(1, 9))
    store.put("small", filled(2))
    assert (store.bytes_in_memory, store.bytes_on_disk) == (16, 36)


def test_bytes_are_counted_by_dtype(store):
    store.put("half", torch.ones(6, dtype=torch.bfloat16))
    store.put("double", torch.ones(2, dtype=torch.float64))
    assert store.bytes_in_memory == 12 + 16


def test_room_that_is_given_back_is_used_again(store, tmp_path):
    for number in range(3):
        store.put(number, filled(number))
    store.drop(0)
    store.put(3, filled(3))
    assert (store.bytes_in_memory, store.bytes_on_disk) == (32, 16)
    store.drop(2)
    assert (store.bytes_in_memory, store.bytes_on_disk) == (32, 0)
    assert files(tmp_path) == []
    store.drop(2)
    store.drop("never there")
    assert (store.bytes_in_memory, store.bytes_on_disk) == (32, 0)


@pytest.mark.parametrize("key", [0, 4])
def test_a_key_holds_one_thing(store, tmp_path, key):
    for number in range(5):
        store.put(number, filled(number))
    for again in range(3):
        store.put(key, filled(10 + again))
    assert store.get(key).tolist() == [12.0] * 4
    assert store.bytes_in_memory + store.bytes_on_disk == 80
    assert 16 * len(files(tmp_path)) == store.bytes_on_disk


def test_files_that_were_let_go_are_not_written_over(store):
    """A new file never takes the name of one that is still there."""
    for number in range(6):
        store.put(number, filled(number))
    store.drop(2)
    store.drop(4)
    for number in range(6, 10):
        store.put(number, filled(number))
    for number in (0, 1, 3, 5, 6, 7, 8, 9):
        assert store.get(number).tolist() == [number] * 4


def test_dropping_a_kind_spares_the_others(store, tmp_path):
    for number in range(3):
        store.put(("one", number), filled(number))
        store.put(("one", "more", number), filled(10 + number))
        store.put(("other", number), filled(20 + number))
    store.put("one", filled(30))
    store.drop_kind("one")
    assert [("one", n) in store for n in range(3)] == [False] * 3
    assert ("one", "more", 1) not in store
    assert store.get("one").tolist() == [30.0] * 4
    assert [store.get(("other", n))[0].item() for n in range(3)] == [20, 21, 22]
    assert 16 * len(files(tmp_path)) == store.bytes_on_disk
    assert store.bytes_in_memory + store.bytes_on_disk == 64


def test_moving_a_kind(store, tmp_path):
    """The second is there on disk, the first in memory; what was there before is gone."""
    for number in range(2):
        store.put(("from", number), filled(number))
    for number in range(3):
        store.put(("to", number), filled(10 + number))
    store.put(("from", 2, "deep"), filled(2))
    store.move("from", "to")
    assert [store.get(("to", n))[0].item() for n in range(2)] == [0, 1]
    assert store.get(("to", 2, "deep")).tolist() == [2.0] * 4
    assert ("to", 2) not in store
    assert ("from", 0) not in store
    assert (store.bytes_in_memory, store.bytes_on_disk) == (32, 16)
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("end", ["close", "leave", "raise"])
def test_nothing_is_left_on_disk(tmp_path, end):
    def use():
        with ActivationStore(0, tmp_path) as store:
            for number in range(3):
                store.put(number, filled(number))
            assert len(files(tmp_path)) == 3
            if end == "close":
                store.close()
                assert (store.bytes_in_memory, store.bytes_on_disk, 1 in store) == (0, 0, False)
                store.close()
            if end == "raise":
                raise ZeroDivisionError

    if end == "raise":
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        use()
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_was_closed_can_be_filled_again(store, tmp_path):
    for number in range(4):
        store.put(number, filled(number))
    store.close()
    for number in range(4, 8):
        store.put(number, filled(number))
    assert [store.get(n)[0].item() for n in range(4, 8)] == [4, 5, 6, 7]
    assert (store.bytes_in_memory, store.bytes_on_disk) == (32, 32)


def test_a_full_disk_is_said(tmp_path):
    with ActivationStore(0, tmp_path) as store:
        store.put("before", filled(1))
        with (
            full_disk(500),
            pytest.raises(CheckpointError, match=r"cannot spill activations to disk: .*too large"),
        ):
            store.put("it", filled(2, 1000))
        assert "it" not in store
        assert store.bytes_on_disk == 16
        store.put("it", filled(3, 1000))
        assert store.get("it").tolist() == [3.0] * 1000
        assert store.get("before").tolist() == [1.0] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with (
        ActivationStore(0, tmp_path / "nowhere") as store,
        pytest.raises(CheckpointError, match=r"cannot spill activations to disk: .*nowhere"),
    ):
        store.put("it", filled(1))


def test_what_is_not_there_is_not_made_up(store):
    with pytest.raises(KeyError, match="it"):
        store.get("it")


@pytest.mark.parametrize("limit", LIMITS)
def test_stacked_in_the_order_that_is_asked_for(tmp_path, limit):
    with ActivationStore(limit, tmp_path) as store:
        for number in range(4):
            store.put(("kind", "name", number), filled(number))
            store.put(("kind", number), filled(10 + number))
        batch = stacked(store, ("kind", "name"), [2, 0, 3])
        assert batch.tolist() == [[2.0] * 4, [0.0] * 4, [3.0] * 4]
        batch.zero_()
        assert store.get(("kind", "name", 2)).tolist() == [2.0] * 4


@pytest.mark.parametrize("limit", LIMITS)
def test_rows_of_a_batch_are_kept_one_by_one(tmp_path, limit):
    batch = torch.arange(12.0).view(3, 4)
    with ActivationStore(limit, tmp_path) as store:
        store.put(("kind", 7), filled(1))
        store.put_rows(("kind",), [5, 7, 6], batch)
        assert store.bytes_in_memory + store.bytes_on_disk == 48
        batch.zero_()
        assert store.get(("kind", 7)).tolist() == [4.0, 5.0, 6.0, 7.0]
        store.drop(("kind", 5))
        assert store.bytes_in_memory + store.bytes_on_disk == 32
        store.move("kind", "other")
        assert store.get(("other", 6)).tolist() == [8.0, 9.0, 10.0, 11.0]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("asked", [[0, 1, 2], [1, 2], [2, 1], [0, 2], [1], [1, 3], [3, 0]])
def test_together_is_stacked(tmp_path, limit, asked):
    with ActivationStore(limit, tmp_path) as store:
        store.put_rows(("kind",), [0, 1, 2], torch.arange(12.0).view(3, 2, 2))
        store.put(("kind", 3), filled(9, 4).view(2, 2))
        expected = stacked(store, ("kind",), asked)
        assert torch.equal(together(store, ("kind",), asked), expected)


def test_together_copies_nothing_that_lies_together():
    store = ActivationStore()
    store.put_rows(("kind",), [0, 1, 2], torch.arange(12.0).view(3, 4))
    first = store.get(("kind", 1)).data_ptr()
    assert together(store, ("kind",), [1, 2]).data_ptr() == first
    assert together(store, ("kind",), [1, 0]).data_ptr() != first


def test_what_is_given_away_is_kept_itself_if_it_fills_its_memory():
    store, batch, part = ActivationStore(), torch.eye(3), torch.eye(4)[:2]
    store.put_rows(("whole",), [0, 1, 2], batch, given_away=True)
    store.put_rows(("part",), [0, 1], part, given_away=True)
    store.put_rows(("copied",), [0, 1, 2], batch)
    assert store.get(("whole", 0)).data_ptr() == batch.data_ptr()
    assert store.get(("part", 0)).data_ptr() != part.data_ptr()
    assert store.get(("copied", 0)).data_ptr() != batch.data_ptr()
    assert store.bytes_in_memory == 9 * 4 + 8 * 4 + 9 * 4
