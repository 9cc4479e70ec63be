import torch

from slimrank.calibration.widening import WIDE, Kind

MASK, SHARED = torch.arange(3.0)[None], torch.ones(1, 2)


def kind_of(*masks):
    single = tuple(((), {"mask": mask, "shared": SHARED, "flag": True}) for mask in masks)
    double = tuple(
        ((), {"mask": mask.repeat(2, 1), "shared": SHARED, "flag": True}) for mask in masks
    )
    return Kind(single, double)


def test_what_doubles_is_repeated_and_the_rest_is_shared():
    kind = kind_of(MASK)
    for size in (2, 5):
        _, found = kind.call(0, size)
        assert torch.equal(found["mask"], MASK.expand(size, 3))
        assert found["shared"] is SHARED
        assert found["flag"] is True
    assert kind.call(0, 1) is kind.single[0]


def test_blocks_that_share_a_mask_share_the_repeated_one():
    kind = kind_of(MASK, MASK, MASK + 1)
    wide = [kind.call(block, 4)[1]["mask"] for block in (0, 1, 2, 0)]
    assert wide[0] is wide[1]
    assert wide[0] is wide[3]
    assert torch.equal(wide[2], wide[0] + 1)
    assert kind.call(0, 3)[1]["mask"].shape == (3, 3)


def test_only_the_latest_are_held():
    kind = kind_of(*(MASK + n for n in range(2 * WIDE)))
    for block in range(2 * WIDE):
        assert torch.equal(kind.call(block, 2)[1]["mask"], (MASK + block).repeat(2, 1))
    assert len(kind.wide) == WIDE
    assert torch.equal(kind.call(0, 2)[1]["mask"], MASK.repeat(2, 1))
