"""Second moments of the loss's gradients at the outputs of linears, last block first.

Blocks are run again one at a time, so only one block's graph is ever held. In front of every block
the hidden states are kept, and spilled to disk where they do not fit.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import nn

from slimrank.calibration.backward import pull_back
from slimrank.calibration.gradient_sums import BlockGradients, BlockGradientSums
from slimrank.calibration.head import head_gradient
from slimrank.calibration.labels import Labels
from slimrank.calibration.replay import call_block
from slimrank.calibration.store import ActivationStore, stacked
from slimrank.calibration.streams import ORIGINAL, SHIFTED, Streams, embed_streams
from slimrank.calibration.windows import TokenWindows
from slimrank.model import Anatomy, let_go
from slimrank.options import Track

GRADIENT, METRIC, OUTPUT_METRIC, ROW_WEIGHTS = "gradient", "metric", "output_metric", "row_weights"
MEAN_GRADIENT = "mean_gradient"


def collect_gradients(
    model: nn.Module,
    anatomy: Anatomy,
    windows: TokenWindows,
    *,
    batch_size: int,
    store: ActivationStore,
    labels: Literal["data", "model"] = "data",
    generator: torch.Generator | None = None,
    weight_gradients: bool = False,
    mean_gradients: bool = False,
    dtype: torch.dtype = torch.float64,
    track: Track = lambda steps, _what: steps,
) -> Iterator[BlockGradients]:
    r"""Take the loss's gradient back through the model, and sum its second moments.

    With ``S`` the second moment of a linear's inputs and ``G`` its metric, an error Δ of the weight
    raises the loss by about ``½ tr(G Δ S Δᵀ)`` nats a token: K-FAC's estimate, which takes
    gradients and inputs to be independent. Cross-entropies are summed, not averaged, so neither
    the length of windows nor their grouping matters.

    Parameters
    ----------
    model : nn.Module
        A causal language model in evaluation mode. Its parameters get no gradients, and are left
        as they are, ``requires_grad`` included.
    anatomy : Anatomy
        Of the linears whose gradients are wanted.
    windows : TokenWindows
        Of all processes, each of which takes its own. Each is of at least 2 tokens. The last of
        each predicts nothing and adds nothing; means are over the others, ``length - 1`` a window.
    batch_size : int
        Windows at once; one if `weight_gradients` are wanted.
    store : ActivationStore
        Holds the inputs of all blocks in the model's dtype, and one gradient of the hidden states
        in float32 or wider; nothing of that stays there at the end. Activations of another run
        that it may hold are lost.
    labels : {'data', 'model'}
        What each position should predict: the next token, or one drawn from the model's own
        prediction (then E[G] is that of Fisher's information matrix).
    generator : torch.Generator, optional
        On the CPU, for labels that are drawn.
    weight_gradients : bool
        Give row weights too (FWSVD's empirical Fisher): with ``ℓ`` the mean loss of one window's
        tokens, the mean over windows of ``Σ_j (∂ℓ/∂W_ij)²`` for row i. The paper's sample is a
        labelled sentence; a window takes its place here.
    mean_gradients : bool
        Give the gradient by each weight too, of the mean loss of all predicted tokens.
    dtype : torch.dtype
        Of the metrics and mean gradients. Products are in float32, sums in float64 (see
        `MomentAccumulator`).
    track : callable
        Wraps the loops over blocks, forwards and backwards, to show progress.

    Yields
    ------
    BlockGradients
        From the last block to the first, so that a caller may use and drop them one by one. The
        block that was yielded may be changed: nothing looks at it again.

    Raises
    ------
    TextError
        If a window has one token only.
    ModelError
        If the model cannot be replayed block by block.
    NumericalError
        If the loss or a gradient is not finite, with the linear's name.
    ValueError
        If labels are to be drawn without a generator.

    References
    ----------
    Martens and Grosse (2015), K-FAC; Hsu et al. (2022), FWSVD, arXiv 2207.00112.
    """
    if labels == "model" and generator is None:
        raise ValueError("labels that the model draws need a generator")
    if labels == "model":
        assert generator is not None
        chosen = Labels.drawn(windows, generator)
    else:
        chosen = Labels(windows)
    size = 1 if weight_gradients else batch_size
    streams = embed_streams(model, anatomy, windows, None, size, store)
    store.drop_kind(SHIFTED)
    store.move(ORIGINAL, _entering(0))
    blocks = list(model.get_submodule(anatomy.path).children())
    for index in track(range(len(blocks)), "forwards"):
        _step_forward(blocks[index], index, streams)
    for number in streams.calibration:
        behind = store.get((_entering(len(blocks)), number))
        gradient = head_gradient(model, anatomy, behind, partial(chosen.at, streams.place(number)))
        store.put((GRADIENT, number), gradient)
    store.drop_kind(_entering(len(blocks)))
    for index in track(range(len(blocks) - 1, -1, -1), "backwards"):
        sums = BlockGradientSums(model, anatomy, index, weight_gradients, mean_gradients)
        _step_back(blocks[index], index, sums, streams)
        store.drop_kind(_entering(index))
        let_go(blocks[index])
        yield sums.result(chosen.count, dtype)
    store.drop_kind(GRADIENT)


def keep_gradients(found: Iterable[BlockGradients], store: ActivationStore) -> None:
    """Keep all blocks' gradients, for a caller that goes through the blocks forwards.

    Parameters
    ----------
    found : iterable of BlockGradients
    store : ActivationStore
        Gets ``("metric", name)`` and, if there are any, ``("row_weights", name)`` and
        ``("mean_gradient", name)`` for each linear, and ``("output_metric", index)`` for each
        block.
    """
    for block in found:
        store.put((OUTPUT_METRIC, block.index), block.output_metric)
        for name, metric in block.metrics.items():
            store.put((METRIC, name), metric)
        for name, weights in block.row_weights.items():
            store.put((ROW_WEIGHTS, name), weights)
        for name, gradient in block.mean_gradients.items():
            store.put((MEAN_GRADIENT, name), gradient)


def _entering(index: int) -> str:
    """Kind of the hidden states in front of a block."""
    return f"entering.{index}"


@torch.no_grad()
def _step_forward(block: nn.Module, index: int, streams: Streams) -> None:
    """Take all windows through a block, and keep what comes out beside what went in."""
    for numbers in streams.groups(streams.calibration):
        states = stacked(streams.store, (_entering(index),), numbers)
        hidden = call_block(block, states, streams.call(index, numbers))
        streams.store.put_rows((_entering(index + 1),), numbers, hidden)


def _step_back(block: nn.Module, index: int, sums: BlockGradientSums, streams: Streams) -> None:
    """Take all gradients back through a block: those at its output give way to its input's."""
    for numbers in streams.groups(streams.calibration):
        gradient = stacked(streams.store, (GRADIENT,), numbers)
        sums.add_output(gradient)
        pulled = pull_back(
            block,
            sums.names,
            stacked(streams.store, (_entering(index),), numbers),
            streams.call(index, numbers),
            gradient,
            with_inputs=sums.needs_inputs,
        )
        sums.add(pulled, gradient.shape[1] - 1)
        streams.store.put_rows((GRADIENT,), numbers, pulled.entering)
