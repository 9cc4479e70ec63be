"""What a model is given, call by call."""

import pytest


@pytest.fixture
def watched(make_model):
    """A model of a family, and the tokens that it is given, call by call."""

    def watch(family: str):
        model, seen = make_model(family), []
        model.register_forward_pre_hook(
            lambda _module, _arguments, given: seen.append(given["input_ids"]), with_kwargs=True
        )
        return model, seen

    return watch
