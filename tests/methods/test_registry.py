import pytest

from slimrank.errors import RecipeError
from slimrank.methods import METHODS, method_by_name


def test_every_key_is_the_name_of_its_class():
    assert list(METHODS) == [
        "svd",
        "fwsvd",
        "asvd",
        "svd-llm",
        "swift-svd",
        "shift-aware",
        "aa-svd",
        "kfac-svd",
        "kfac-aa-svd",
    ]
    for name, kind in METHODS.items():
        assert kind.name == name
        assert isinstance(method_by_name(name), kind)


def test_the_registry_cannot_be_written():
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["svd"]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("swift_svd", "swift-svd"),
        ("swiftsvd", "swift-svd"),
        ("svdllm", "svd-llm"),
        ("sdv", "svd"),
        ("aasvd", "aa-svd"),
        ("shift_aware", "shift-aware"),
        ("kfac", "kfac-svd"),
        ("fw-svd", "fwsvd"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong, near):
    with pytest.raises(RecipeError, match=f"no method is called '{wrong}'; did you mean '{near}'"):
        method_by_name(wrong)


@pytest.mark.parametrize("wrong", ["", "quantise"])
def test_a_name_like_no_other_is_answered_with_all(wrong):
    with pytest.raises(RecipeError) as caught:
        method_by_name(wrong)
    assert "did you mean" not in str(caught.value)
    for name in METHODS:
        assert name in str(caught.value)
