"""Activations by key: in memory up to a limit, on disk beyond it."""

import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimrank.errors import CheckpointError


class ActivationStore:
    """Tensors by key, on the CPU; what does not fit within a limit is spilled to disk.

    Parameters
    ----------
    limit : int, optional
        Bytes to hold in memory; no limit if left out.
    folder : str or Path, optional
        Where a passing folder is made for the rest, once it is needed; the system's if left out.

    Examples
    --------
    >>> with ActivationStore(limit=10) as store:
    ...     for number in range(3):
    ...         store.put(number, torch.full((2,), float(number)))
    ...     store.bytes_in_memory, store.bytes_on_disk, store.get(2).tolist()
    (8, 16, [2.0, 2.0])
    """

    def __init__(self, limit: int | None = None, folder: str | Path | None = None) -> None:
        self.limit = limit
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._tensors: dict[Hashable, Tensor] = {}
        self._files: dict[Hashable, tuple[Path, int]] = {}
        self._written = 0

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tensors or key in self._files

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a copy of a tensor, in its dtype; what was under the key before is let go.

        Raises
        ------
        CheckpointError
            If the disk is full.
        """
        self.drop(key)
        size = tensor.numel() * tensor.element_size()
        if self.limit is None or self.bytes_in_memory + size <= self.limit:
            self._tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()
            self.bytes_in_memory += size
            return
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(
                    prefix=".slimrank-activations-", dir=self._parent
                )
            path = Path(self._folder.name) / f"{self._written}.safetensors"
            save_file({"tensor": tensor.detach().cpu().contiguous()}, path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot spill activations to disk: {error}") from error
        self._written += 1
        self._files[key] = (path, size)
        self.bytes_on_disk += size

    def put_rows(
        self,
        kind: tuple[Hashable, ...],
        sequences: Sequence[int],
        batch: Tensor,
        *,
        given_away: bool = False,
    ) -> None:
        """Keep the rows of a batch under ``(*kind, sequence)``; copied at once where all fit.

        Parameters
        ----------
        kind : tuple
        sequences : sequence of int
        batch : Tensor of shape (sequences, ...)
        given_away : bool
            Nobody else will change the batch: it is then kept itself, if it fills its memory.

        Raises
        ------
        CheckpointError
            If the disk is full.
        """
        keys = [(*kind, number) for number in sequences]
        for key in keys:
            self.drop(key)
        size = batch.numel() * batch.element_size()
        if self.limit is not None and self.bytes_in_memory + size > self.limit:
            for key, row in zip(keys, batch, strict=True):
                self.put(key, row)
            return
        is_kept = given_away and batch.untyped_storage().nbytes() == size
        rows = batch.detach().to("cpu", copy=not is_kept).contiguous()
        self._tensors.update(zip(keys, rows.unbind(), strict=True))
        self.bytes_in_memory += size

    def get(self, key: Hashable) -> Tensor:
        """What is kept under a key; not to be changed."""
        if key in self._tensors:
            return self._tensors[key]
        return load_file(self._files[key][0])["tensor"]

    def drop(self, key: Hashable) -> None:
        """Let go of what is kept under a key, if anything."""
        if key in self._tensors:
            tensor = self._tensors.pop(key)
            self.bytes_in_memory -= tensor.numel() * tensor.element_size()
        elif key in self._files:
            path, size = self._files.pop(key)
            path.unlink(missing_ok=True)
            self.bytes_on_disk -= size

    def drop_kind(self, kind: str) -> None:
        """Let go of everything whose key is a tuple that begins with this."""
        for key in self._of_kind(kind):
            self.drop(key)

    def move(self, kind: str, other: str) -> None:
        """Give what is under ``(kind, …)`` the key ``(other, …)``; what was there is let go."""
        self.drop_kind(other)
        for key in self._of_kind(kind):
            renamed = (other, *key[1:])
            if key in self._tensors:
                self._tensors[renamed] = self._tensors.pop(key)
            else:
                self._files[renamed] = self._files.pop(key)

    def _of_kind(self, kind: str) -> list[tuple[Hashable, ...]]:
        every = (*self._tensors, *self._files)
        return [key for key in every if isinstance(key, tuple) and key[0] == kind]

    def close(self) -> None:
        """Let go of everything, on disk too."""
        self._tensors.clear()
        self._files.clear()
        self.bytes_in_memory = self.bytes_on_disk = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def stacked(store: ActivationStore, kind: tuple[Hashable, ...], sequences: list[int]) -> Tensor:
    """Batch of what is kept for some sequences under ``(*kind, sequence)``; may be changed."""
    return torch.stack([store.get((*kind, number)) for number in sequences])


def together(store: ActivationStore, kind: tuple[Hashable, ...], sequences: list[int]) -> Tensor:
    """The same, not to be changed: rows that were put as one batch are not copied.

    Examples
    --------
    >>> store = ActivationStore()
    >>> store.put_rows(("input",), (3, 4), torch.eye(2))
    >>> batch = together(store, ("input",), [3, 4])
    >>> batch.tolist(), batch.data_ptr() == store.get(("input", 3)).data_ptr()
    ([[1.0, 0.0], [0.0, 1.0]], True)
    """
    rows = [store.get((*kind, number)) for number in sequences]
    first, step = rows[0], rows[0].numel()
    for place, row in enumerate(rows):
        is_next = row.storage_offset() == first.storage_offset() + place * step
        alike = row.shape == first.shape and row.is_contiguous()
        if not (
            alike and is_next and row.untyped_storage()._cdata == first.untyped_storage()._cdata
        ):
            return torch.stack(rows)
    return first.as_strided((len(rows), *first.shape), (step, *first.stride()))
