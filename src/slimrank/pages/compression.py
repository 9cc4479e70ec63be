"""The page of one compressed folder."""

from slimrank.pages import depth, linears
from slimrank.pages.content import Fact, Page, Section, Table
from slimrank.pages.promises import chart_of_promises
from slimrank.pages.run_costs import chart_of_phases, chart_of_search
from slimrank.pages.tuning import chart_of_tuning, fact_of_tuning
from slimrank.pages.wording import in_bytes, in_params, in_percent, in_time
from slimrank.report import AllocationReport, CompressionReport


def compression_page(report: CompressionReport) -> Page:
    """Lay out all that a report holds."""
    sections = [_linears(report)]
    if report.blocks:
        sections.append(_blocks(report))
    elif report.tuning is not None:
        sections.append(Section("Tuning", charts=(chart_of_tuning(report.tuning),)))
    sections += [_checks(report), _recipe(report)]
    recipe = report.recipe.model_dump(mode="json")
    settings = [report.recipe.method, f"{recipe['allocation']} ranks"]
    if recipe.get("layout") is not None:
        settings.append(f"{recipe['layout']} layout")
    settings.append("block after block" if report.recipe.is_sequential else "one-shot")
    settings.append(f"refined ({recipe['refine']['preset']})" if report.recipe.refines else "")
    settings.append("tuned" if report.tuning is not None else "")
    return Page(
        kind="Compression report",
        title=report.model,
        subtitle=" · ".join(setting for setting in settings if setting),
        facts=_facts(report),
        sections=tuple(sections),
        warnings=report.warnings,
    )


def _facts(report: CompressionReport) -> tuple[Fact, ...]:
    size = report.size
    num_low_rank = sum(x.rank is not None for x in report.linears)
    facts = [
        Fact(
            "kept of the linears",
            in_percent(size.target_params / size.target_params_before),
            f"{in_params(size.target_params_before)} → {in_params(size.target_params)} parameters; "
            f"{num_low_rank} of {len(report.linears)} have low rank",
        ),
        Fact(
            "kept of the model",
            in_percent(size.model_params / size.model_params_before),
            f"{in_params(size.model_params_before)} → {in_params(size.model_params)} parameters",
        ),
        Fact(
            "weights on disk",
            in_bytes(size.weight_bytes),
            f"from {in_bytes(size.weight_bytes_before)}; the dense model in int8 would take "
            f"{in_bytes(size.int8_bytes)}",
        ),
    ]
    facts += _facts_of_losses(report)
    if report.kv_cache is not None:
        cache = report.kv_cache
        facts.append(
            Fact(
                "key/value cache",
                in_percent(cache.latent_values / cache.dense_values),
                f"{cache.dense_values * cache.value_bytes:,} → "
                f"{cache.latent_values * cache.value_bytes:,} bytes a token",
            )
        )
    note = f"peak memory {in_bytes(report.peak_bytes)}; {report.tokens:,} calibration tokens"
    facts.append(Fact("time to compress", in_time(sum(report.seconds.values())), note))
    return tuple(facts)


def _facts_of_losses(report: CompressionReport) -> list[Fact]:
    facts: list[Fact] = []
    low_rank = [x for x in report.linears if x.rank is not None]
    untuned = "; before all blocks were trained together" if report.tuning is not None else ""
    if report.blocks:
        last = report.blocks[-1]
        error = last.held_out or last.calibration
        text = "held-out" if last.held_out else "calibration"
        note = (
            f"of its output's energy, on {text} text; cosine distance {error.cosine_distance:.3f}"
        )
        value = in_percent(error.relative_error)
        facts.append(Fact("error of the last block", value, note + untuned))
    elif low_rank:
        losses = [x.measured_loss for x in low_rank]
        note = f"of the energy of their targets; worst {in_percent(max(losses))}"
        value = in_percent(sum(losses) / len(losses))
        facts.append(Fact("mean loss of linears", value, note + untuned))
    if report.tuning is not None:
        facts.append(fact_of_tuning(report.tuning))
    return facts


def _linears(report: CompressionReport) -> Section:
    charts = []
    if linears.by_spot(report.linears):
        charts.append(linears.map_of_kept(report.linears))
        if any(x.measured_loss > 0 for x in report.linears):
            charts.append(linears.map_of_losses(report.linears))
        if any(x.effective_rank is not None for x in report.linears):
            charts.append(linears.map_of_effective_ranks(report.linears))
    training = "refinement" if report.recipe.refines else "training of all blocks together"
    start = f" They are those that the {training} started from." if report.is_trained else ""
    return Section(
        "What was kept where",
        "Losses are those of the method's objective for each linear on its own, its ridge included."
        + start,
        charts=tuple(charts),
        tables=(linears.table_of_kinds(report.linears),) if report.linears else (),
    )


def _blocks(report: CompressionReport) -> Section:
    charts = [*depth.charts_of_errors(report.blocks), *depth.charts_of_refinement(report.blocks)]
    untuned = ""
    if report.tuning is not None:
        charts.append(chart_of_tuning(report.tuning))
        untuned = " Measured before all blocks were trained together."
    return Section(
        "Block after block",
        "How far the output of each compressed block is from that of the original block on the "
        "original stream." + untuned,
        charts=tuple(charts),
        tables=(depth.table_of_blocks(report.blocks),),
    )


def _checks(report: CompressionReport) -> Section:
    charts = []
    if any(x.rank is not None and x.predicted_loss > 0 for x in report.linears):
        charts.append(chart_of_promises(report.linears, report.is_trained))
    if isinstance(report.allocation, AllocationReport) and report.allocation.trials:
        charts.append(chart_of_search(report.allocation))
    if report.seconds:
        charts.append(chart_of_phases(report.seconds))
    rows = [*report.environment.items(), ("peak memory", in_bytes(report.peak_bytes))]
    return Section(
        "Checks, time and place",
        charts=tuple(charts),
        tables=(Table("Environment", ("what", "value"), tuple(rows), num_names=2),),
    )


def _recipe(report: CompressionReport) -> Section:
    prints = [
        ("recipe", report.recipe_fingerprint),
        ("calibration tokens", report.calibration_fingerprint or "none were used"),
    ]
    return Section(
        "Recipe",
        "Every setting, defaults included; slimrank compress --recipe takes it as it stands.",
        tables=(Table("Fingerprints (SHA-256)", ("of", "value"), tuple(prints), num_names=2),),
        code=report.recipe.to_yaml(),
    )
