"""Processes that share a run, as torchrun starts them; forked, so they are there at once."""

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist


def run_together(count: int, folder: Path, do: Callable[[int], object]) -> None:
    """Call `do(number)` in so many processes that have joined; fail with what any of them raised.

    Parameters
    ----------
    count : int
    folder : Path
        Where they meet; made if it is not there.
    do : callable
        May be a closure.
    """
    codes, told = ended_together(count, folder, do)
    assert not told, told
    assert codes == [0] * count


def ended_together(
    count: int, folder: Path, do: Callable[[int], object]
) -> tuple[list[int | None], str]:
    """The same; give how each ended, and what was raised."""
    folder.mkdir(parents=True, exist_ok=True)
    context = get_context("fork")
    started = [context.Process(target=_child, args=(n, count, folder, do)) for n in range(count)]
    for process in started:
        process.start()
    deadline = time.monotonic() + 150
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in started:
        if process.is_alive():
            (folder / f"{process.pid}.error").write_text("did not end")
            process.kill()
            process.join()
    told = [path.read_text() for path in sorted(folder.glob("*.error"))]
    return [process.exitcode for process in started], "\n".join(told)


def _child(number: int, count: int, folder: Path, do: Callable[[int], object]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "meeting"), count),
            rank=number,
            world_size=count,
            timeout=timedelta(seconds=60),
        )
        dist.barrier()  # none may end while others still meet
        do(number)
    except BaseException:  # noqa: BLE001  # whatever ends it is what the test wants to know
        (folder / f"{number}.error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)
