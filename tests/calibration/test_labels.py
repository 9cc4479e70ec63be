"""Labels are the next tokens, or follow what the model predicts; one number settles each."""

import pytest
import torch

from slimrank import TokenWindows
from slimrank.calibration.labels import Labels
from slimrank.errors import TextError


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def windows(*lengths):
    return TokenWindows(tuple(torch.arange(length) + 10 * length for length in lengths))


def test_the_next_token():
    labels = Labels(windows(5, 3))
    assert labels.count == 6
    assert labels.at(0, 0, torch.zeros(4, 99)).tolist() == [51, 52, 53, 54]
    assert labels.at(0, 1, torch.zeros(2, 99)).tolist() == [52, 53]
    assert labels.at(1, 0, torch.zeros(2, 99)).tolist() == [31, 32]


def test_they_follow_the_prediction():
    """Shares of 20,000 draws are within five standard deviations."""
    count = 20_000
    shares = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    labels = Labels.drawn(windows(count + 1), drawn())
    found = labels.at(0, 0, (shares.log() + 7).expand(count, -1))
    seen = found.bincount(minlength=5) / count
    assert seen[shares == 0].tolist() == [0, 0]
    assert ((seen - shares).abs() <= 5 * (shares * (1 - shares) / count).sqrt()).all()


@pytest.mark.parametrize(("place", "token"), [(0.0, 1), (0.49, 1), (0.5, 2), (1 - 2.0**-53, 2)])
def test_the_ends(place, token):
    """A token without a share is never drawn, not even at an end."""
    labels = Labels(windows(2), (torch.tensor([place], dtype=torch.float64),))
    shares = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    assert labels.at(0, 0, shares.log()).tolist() == [token]


def test_parts_give_what_the_whole_gives():
    labels = Labels.drawn(windows(9, 9), drawn())
    logits = torch.randn(8, 50, generator=drawn(1))
    whole = labels.at(1, 0, logits)
    parts = [labels.at(1, start, logits[start : start + 3]) for start in (0, 3, 6)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, labels.at(0, 0, logits))


def test_a_window_of_one_token_is_refused():
    with pytest.raises(TextError, match="at least 2 tokens"):
        Labels(windows(5, 1))
