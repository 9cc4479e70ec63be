"""What is finished of a profile, kept beside its folder so that a run that was cut off can go on.

Beside a manifest and an entry for each finished block there is the folder to be, which holds the
bases already: at the end it only gets its own name, so nothing is on the disk twice.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from slimrank import processes
from slimrank.checkpoint.durable import (
    LOCK,
    Frozen,
    damaged,
    file_hash,
    give_name,
    locked,
    read_sealed,
    remove_passing,
    sealed,
    sync_all,
    write_durably,
)
from slimrank.checkpoint.manifest import require_same
from slimrank.checkpoint.profile import MANIFEST as PROFILE
from slimrank.checkpoint.profile import ProfiledLinear, block_file, write_tensors
from slimrank.checkpoint.unfinished import (
    Unfinished,
    new_state_folder,
    remove_state_folder,
    state_folder,
)
from slimrank.errors import CheckpointError

MANIFEST, TO_BE = "profile-run.json", "profile"


class ProfileRun(Frozen):
    """What an unfinished profile is of; a resumed one must be of the same.

    Parameters
    ----------
    marks : dict of str to str
        By what they are told by: fingerprints of recipe, model and text, and what is kept.
    versions : dict of str to str
        As in `RunManifest`.
    """

    format_version: Literal[1] = 1
    marks: dict[str, str]
    versions: dict[str, str]


class ProfiledBlock(Frozen):
    """A block that is done.

    Parameters
    ----------
    index : int
    linears : tuple of ProfiledLinear
    influence : float
    influence_after_norm : float or None
    files : dict of str to str
        SHA-256 of its bases, if they are kept.
    seconds : dict of str to float
        It took, by phase.
    warnings : tuple of str
        Given while it was worked on.
    spectra : str
        SHA-256 of the file of its spectra; empty while they are in memory only.
    """

    index: int
    linears: tuple[ProfiledLinear, ...]
    influence: float
    influence_after_norm: float | None
    files: dict[str, str]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    spectra: str = ""


UNFINISHED_PROFILE = Unfinished("profile", MANIFEST, ProfileRun)


def removed_what_is_left(out: Path, recipe: str | None = None) -> bool:
    """Remove the state of a profile that stands; tell whether there was one.

    Parameters
    ----------
    out : Path
    recipe : str, optional
        Fingerprint that the state's recipe must have, if the state still says of what it is.

    Raises
    ------
    CheckpointError
        If another process works on it, the state is damaged, or the disk refuses.
    """
    if not (out / PROFILE).is_file() or (state_folder(out) / TO_BE).exists():
        return False
    return UNFINISHED_PROFILE.removed_what_is_left(
        out, lambda begun: recipe is None or begun.marks.get("recipe") == recipe
    )


@final
@dataclass(slots=True, eq=False)
class ProfileState:
    """The finished part of a profile, open to one process at a time, or to those that share a run.

    Of these the first one locks and writes, and the others come after it. Made by `begin` or
    `resume`. As a context manager it lets other processes in again at the end, and removes what it
    has begun if an error comes before any block is finished.

    Parameters
    ----------
    out : Path
    folder : Path
        `state_folder` of it.
    manifest : ProfileRun
    finished : list of ProfiledBlock
        Blocks 0, 1, … without a gap.
    """

    out: Path
    folder: Path
    manifest: ProfileRun
    finished: list[ProfiledBlock]
    _lock: ExitStack
    _is_new: bool

    @classmethod
    def begin(cls, out: Path, manifest: ProfileRun) -> "ProfileState":
        """Make the folder of a new run.

        Raises
        ------
        CheckpointError
            If there is an unfinished one, another process works on it, or the disk refuses.
        """
        folder = state_folder(out)
        if not processes.is_first():
            processes.wait()
            return cls(out, folder, manifest, [], ExitStack(), False)
        with new_state_folder(out) as lock:
            UNFINISHED_PROFILE.require_none(out)
            remove_passing(folder)
            if any(path.name not in (LOCK, TO_BE) for path in folder.iterdir()):
                raise CheckpointError(f"{folder} holds files but no {MANIFEST}; delete it")
            _remove_others(folder / TO_BE, set())
            write_durably(folder, MANIFEST, sealed(manifest))
            processes.wait()
            return cls(out, folder, manifest, [], lock.pop_all(), True)

    @classmethod
    def resume(cls, out: Path) -> "ProfileState":
        """Open what a run that was cut off has left, and check the hash of every file.

        Raises
        ------
        CheckpointError
            If another process works on it, or a file is missing, damaged or of another version.
        """
        folder = state_folder(out)
        if not processes.is_first():
            processes.wait()
            manifest = UNFINISHED_PROFILE.read(out)
            state = cls(out, folder, manifest, _read_blocks(folder), ExitStack(), False)
            processes.wait()
            return state
        with locked(folder, out) as lock:
            manifest = UNFINISHED_PROFILE.read(out)
            remove_passing(folder)
            for path in folder.glob(".*"):  # activations that a killed process had spilled
                shutil.rmtree(path, ignore_errors=True)
            finished = _read_blocks(folder)
            _remove_others(folder / TO_BE, {name for block in finished for name in block.files})
            processes.wait()  # for the others to read
            processes.wait()  # until they have
            return cls(out, folder, manifest, finished, lock.pop_all(), False)

    def require(self, marks: Mapping[str, str]) -> None:
        """See that what is to go on is what was begun.

        Raises
        ------
        CheckpointError
            With all that differs, in one line.
        """
        require_same(self.folder, "profile", self.manifest.marks, marks)

    @property
    def bytes_kept(self) -> int:
        """Bytes of the bases that are finished."""
        names = (name for block in self.finished for name in block.files)
        return sum((self.folder / TO_BE / name).stat().st_size for name in names)

    def save(self, block: ProfiledBlock, spectra: dict[str, Tensor]) -> None:
        """Keep the next block, whose bases are in the folder to be. It is finished once this ends.

        Raises
        ------
        CheckpointError
            If it is not the next block.
        OSError, SafetensorError
            If the disk is full or refuses.
        """
        if block.index != len(self.finished):
            raise CheckpointError(
                f"block {block.index} cannot be kept in {self.folder}: block "
                f"{len(self.finished)} is next"
            )
        if processes.is_first():
            block = self._write(block, spectra)
        self.finished.append(block)  # it counts, also if another process has died meanwhile
        processes.wait()

    def _write(self, block: ProfiledBlock, spectra: dict[str, Tensor]) -> ProfiledBlock:
        """Bring a block to the disk."""
        name = _spectra_file(block.index)
        digest = write_tensors(self.folder, name, spectra)[name]
        sync_all(self.folder / TO_BE, block.files)
        sync_all(self.folder, (name,))
        block = block.model_copy(update={"spectra": digest})
        write_durably(self.folder, _entry_file(block.index), sealed(block))
        return block

    def spectra(self, index: int) -> dict[str, Tensor]:
        """Read the spectra of a finished block."""
        found: dict[str, Tensor] = load_file(self.folder / _spectra_file(index))
        return found

    @contextmanager
    def renamed_when_done(self) -> Iterator[Path]:
        """Give the folder to be; give it its own name at the end, and remove the state.

        Raises
        ------
        CheckpointError
            If the disk is full or refuses, or `out` has appeared meanwhile.
        """
        try:
            yield self.folder / TO_BE
            sync_all(self.folder / TO_BE)
            if self.out.exists():
                raise CheckpointError(f"{self.out} appeared meanwhile; it was left alone")
            give_name(self.folder / TO_BE, self.out)
        except (OSError, SafetensorError) as error:
            kept = "finished blocks are kept; go on with --resume"
            kept = kept if self.finished else "nothing was kept"
            raise CheckpointError(f"cannot write {self.out}: {error}; {kept}") from error
        remove_state_folder(self.folder, MANIFEST)

    def __enter__(self) -> "ProfileState":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None and self._is_new and not self.finished:
                with suppress(CheckpointError):  # as much as the disk lets go of
                    remove_state_folder(self.folder, MANIFEST)
        finally:
            self._lock.close()


def _read_blocks(folder: Path) -> list[ProfiledBlock]:
    """Read the entries of all blocks, and check their files."""
    count = len(list(folder.glob("block-*.json")))
    return [_read_block(folder, index) for index in range(count)]


def _read_block(folder: Path, index: int) -> ProfiledBlock:
    """Read a block's entry, and check its files."""
    name = _entry_file(index)
    advice = f"delete {name} and those after it, or all of {folder}"
    if not (folder / name).exists():
        raise CheckpointError(f"{folder} lacks {name}, but holds later blocks; {advice}")
    block = read_sealed(folder / name, ProfiledBlock, advice)
    if block.index != index or not block.files.keys() <= {block_file(index)}:
        raise CheckpointError(f"{folder / name} is of block {block.index}; {advice}")
    hashes = {folder / TO_BE / file: digest for file, digest in block.files.items()}
    hashes[folder / _spectra_file(index)] = block.spectra
    for path, digest in hashes.items():
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {advice}")
        try:
            found = file_hash(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        if found != digest:
            raise CheckpointError(damaged(path, advice))
    return block


def _remove_others(folder: Path, names: set[str]) -> None:
    """Leave only what belongs to finished blocks in the folder to be."""
    try:
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error


def _entry_file(index: int) -> str:
    return f"block-{index:05d}.json"


def _spectra_file(index: int) -> str:
    return f"block-{index:05d}.spectra.safetensors"
