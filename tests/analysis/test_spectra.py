"""Effective ranks, ranks for energy, losses and correlations of profiles written by hand."""

import csv
import dataclasses
import io

import pytest
import torch

from slimrank.allocation import Budget, LinearShape, uniform
from slimrank.analysis import AnalysisReport, analyze, mean_by_block, ner_by_block
from slimrank.errors import CheckpointError
from tiny import profiles

# effective ranks 1 2 3 4 3 1 of 4, and importance falls by 0.2 for each
FALLING = {f"{i}.q_proj": profiles.flat(count) for i, count in enumerate((1, 2, 3, 4, 3, 1))}
IMPORTANCE = [0.9, 0.7, 0.5, 0.3, 0.5, 0.9]


def test_one_linear_by_hand():
    report = analyze(profiles.build({"0.q_proj": [3.0, 2.0, 1.0, 0.0]}, [0.25], out_features=8))
    linear = report.linears[0]
    shares = torch.tensor([1 / 2, 1 / 3, 1 / 6], dtype=torch.float64)
    erank = float(torch.exp(-(shares * shares.log()).sum()))
    assert linear.effective_rank == pytest.approx(erank, rel=1e-12)
    assert linear.normalized_effective_rank == pytest.approx(erank / 4, rel=1e-12)
    # energies 9 4 1 of 14: 0.64, 0.93, 1
    assert linear.energy_ranks == {0.5: 1, 0.9: 2, 0.95: 3, 0.99: 3, 0.999: 3}
    # break-even 8 * 4 / 12 = 2.67, so ranks 2 2 1 1 1 1
    expected = {0.9: 1 / 14, 0.8: 1 / 14, 0.7: 5 / 14, 0.6: 5 / 14, 0.5: 5 / 14, 0.4: 5 / 14}
    assert linear.losses == pytest.approx(expected)
    assert (linear.importance, linear.block, linear.kind) == (0.25, 0, "q_proj")


def test_ranks_of_the_losses_are_those_of_the_uniform_allocation():
    size = 40
    squares = torch.arange(size, 0, -1, dtype=torch.float64)
    report = analyze(profiles.build({"0.up": squares.sqrt().tolist()}, [1.0], out_features=70))
    for ratio, loss in report.linears[0].losses.items():
        rank = uniform([LinearShape("up", 70, size)], Budget(ratio)).ranks["up"]
        assert loss == pytest.approx(float(squares[rank:].sum() / squares.sum()))


def test_no_loss_where_no_rank_fits():
    linear = analyze(profiles.build({"0.gate": [2.0]}, [1.0], out_features=8)).linears[0]
    assert set(linear.losses.values()) == {None}
    assert linear.energy_ranks[0.999] == 1


def test_correlation_with_importance_by_hand():
    report = analyze(profiles.build(FALLING, IMPORTANCE))
    (kind,) = report.kinds
    assert kind.mean_effective_rank == pytest.approx(14 / 6)
    assert kind.mean_energy_ranks[0.99] == pytest.approx(14 / 6)
    found = kind.correlations
    for correlation, blocks in ((found.all_blocks, 6), (found.inner_blocks, 3)):
        assert correlation.num_blocks == blocks
        assert correlation.pearson.value == pytest.approx(-1)
        assert correlation.spearman.sign == "negative"
    assert found.all_blocks_after_norm is None
    assert report.overall == found  # one module type


def test_inner_blocks_leave_out_the_first_two_and_the_last():
    # three inner blocks rise; the outer ones, at 9, 9 and 9, pull the whole the other way
    spectra = {f"{i}.q": profiles.flat(count) for i, count in enumerate((1, 1, 2, 3, 4, 1))}
    found = analyze(profiles.build(spectra, [9.0, 9.1, 0.2, 0.3, 0.4, 9.2])).overall
    assert found.all_blocks.pearson.sign == "negative"
    assert found.inner_blocks.pearson.value == pytest.approx(1)


def test_last_block_after_the_norm_can_turn_the_sign():
    report = analyze(profiles.build({**FALLING, "5.q_proj": profiles.flat(4)}, IMPORTANCE, 9.0))
    found = report.overall
    assert found.all_blocks.pearson.sign == "negative"
    assert found.all_blocks_after_norm.pearson.sign == "positive"
    assert (report.importance[-1], report.importance_after_norm) == (0.9, 9.0)


def test_experts_of_a_block_weigh_as_one_linear():
    spectra = {f"0.mlp.experts.{e}.up": profiles.flat(e + 1) for e in range(3)}
    report = analyze(profiles.build({"0.q": profiles.flat(4), **spectra}, [1.0]))
    assert [kind.kind for kind in report.kinds] == ["q", "mlp.experts.*.up"]
    assert report.kinds[1].num_linears == 3
    assert ner_by_block(report.linears, "mlp.experts.*.up") == pytest.approx({0: 0.5})
    assert mean_by_block(report.linears) == pytest.approx({0: 0.75})


def test_a_silent_expert_is_in_no_mean_and_is_named():
    spectra = {"0.experts.0.up": profiles.flat(2), "0.experts.1.up": profiles.flat(0)}
    report = analyze(profiles.build(spectra, [1.0]))
    assert report.kinds[0].num_linears == 1
    assert report.kinds[0].mean_normalized_effective_rank == pytest.approx(0.5)
    assert report.linears[1].losses[0.5] == 0
    (warning,) = report.warnings
    assert "1 linears gave no output" in warning
    assert "experts.1.up" in warning


def test_too_few_tokens_are_said():
    (warning,) = analyze(profiles.build(FALLING, IMPORTANCE, tokens=3)).warnings
    assert "6 linears saw fewer tokens" in warning
    assert analyze(profiles.build(FALLING, IMPORTANCE, tokens=4)).warnings == ()


def test_a_profile_in_the_metric_of_the_loss_is_refused():
    found = profiles.build(FALLING, IMPORTANCE)
    manifest = found.manifest.model_copy(update={"method": "kfac-svd"})
    with pytest.raises(CheckpointError, match=r"a profile by kfac-svd.*profile with --effort fast"):
        analyze(dataclasses.replace(found, manifest=manifest))


def test_a_profile_without_any_output_is_refused():
    with pytest.raises(CheckpointError, match="no linear gave any output"):
        analyze(profiles.build({"0.q": profiles.flat(0)}, [1.0]))


@pytest.mark.parametrize("blocks", [1, 2])
def test_few_blocks_give_a_reason(blocks):
    spectra = {f"{i}.q": profiles.flat(i + 1) for i in range(blocks)}
    found = analyze(profiles.build(spectra, [0.5, 0.4][:blocks], 0.1)).overall
    assert found.all_blocks.pearson is None
    assert "3 are needed" in found.all_blocks.reason
    assert found.inner_blocks.reason == "0 blocks, and 3 are needed"


def test_constant_importance_gives_a_reason():
    found = analyze(profiles.build(FALLING, [0.5] * 6)).overall
    assert found.all_blocks.reason == "the importance is the same in all blocks"
    assert found.all_blocks.spearman is None


def test_json_and_csv_say_the_same():
    report = analyze(profiles.build(FALLING, IMPORTANCE, 0.4))
    assert AnalysisReport.model_validate_json(report.model_dump_json(indent=1)) == report
    rows = list(csv.DictReader(io.StringIO(report.csv())))
    assert len(rows) == len(FALLING)
    for row, linear in zip(rows, report.linears, strict=True):
        assert row["name"] == linear.name
        assert float(row["effective_rank"]) == linear.effective_rank
        assert int(row["rank_99.9_percent"]) == linear.energy_ranks[0.999]
        assert float(row["loss_keep_0.9"]) == linear.losses[0.9]
        assert (row["loss_keep_0.4"], linear.losses[0.4]) == ("", None)  # rank 0.8
        assert float(row["importance"]) == linear.importance
