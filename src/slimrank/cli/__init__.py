"""The command line: parses and prints, computes nothing."""

import typer

from slimrank.cli.analyze import analyze_command
from slimrank.cli.bench import bench_app
from slimrank.cli.benchmark import benchmark_command
from slimrank.cli.chat import chat_command
from slimrank.cli.compress import compress_command
from slimrank.cli.demo import demo_command
from slimrank.cli.depth import depth_command
from slimrank.cli.evaluate import evaluate_command
from slimrank.cli.export import export_command
from slimrank.cli.heal import heal_command
from slimrank.cli.inspect import inspect_command
from slimrank.cli.output import version_option
from slimrank.cli.plan import plan_command
from slimrank.cli.profile import profile_command
from slimrank.cli.quantize import quantize_command
from slimrank.cli.report import report_command

app = typer.Typer(
    name="slimrank",
    help="Make a causal language model smaller by activation-aware low-rank factorisation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.callback()(version_option)
app.command("compress")(compress_command)
app.command("plan")(plan_command)
app.command("profile")(profile_command)
app.command("analyze")(analyze_command)
app.command("depth")(depth_command)
app.command("heal")(heal_command)
app.command("quantize")(quantize_command)
app.command("export")(export_command)
app.command("report")(report_command)
app.command("inspect")(inspect_command)
app.command("evaluate")(evaluate_command)
app.command("chat")(chat_command)
app.command("benchmark")(benchmark_command)
app.add_typer(bench_app, name="bench")
app.command("demo")(demo_command)


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["app", "main"]
