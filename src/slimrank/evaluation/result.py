"""One figure, with what is needed to get it again."""

from pydantic import BaseModel, ConfigDict


class EvalResult(BaseModel):
    """A measured figure.

    Parameters
    ----------
    metric : str
    value : float
    stderr : float
        Standard error of `value` over windows (delta method for perplexity).
    mean_loss : float
        Cross-entropy in nats per token.
    tokens : int
        Predicted tokens.
    windows, sequence_length : int
    skipped : int
        Always 0: a window that gives no finite loss is an error.
    data_fingerprint : str
        SHA-256 of the token ids.
    seconds : float
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    value: float
    stderr: float
    mean_loss: float
    tokens: int
    windows: int
    sequence_length: int
    skipped: int = 0
    data_fingerprint: str
    seconds: float
