"""Importing slimrank and asking for help is cheap and touches no device."""

import subprocess
import sys

NO_DEVICE = """
import torch
def refuse(*a, **k): raise AssertionError("a device was touched")
torch.cuda.init = torch.cuda._lazy_init = torch.cuda.device_count = torch.cuda.is_available = refuse
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )


def test_import_touches_no_device():
    done = run(NO_DEVICE + "import slimrank")
    assert done.returncode == 0, done.stderr


def test_help_touches_no_device():
    done = run(
        NO_DEVICE + "import sys; sys.argv = ['slimrank', '--help']\nimport slimrank.cli\n"
        "slimrank.cli.main()"
    )
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout


def test_import_loads_nothing_heavy_beyond_transformers():
    done = run(
        "import sys, torch, transformers.quantizers.auto\nbefore = set(sys.modules)\n"
        "import slimrank\nnew = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(new & {'datasets', 'gguf', 'peft', 'typer', 'matplotlib', 'lm_eval'}))"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_loads_no_plots_and_no_statistics():
    done = run(
        "import sys\nsys.argv = ['slimrank', 'analyze', '--help']\nimport slimrank.cli\n"
        "try: slimrank.cli.main()\nexcept SystemExit: pass\n"
        "print(sorted({'matplotlib', 'scipy.stats'} & set(sys.modules)))"
    )
    assert "analysis.json" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_registering_twice_is_safe():
    done = run("import slimrank; from slimrank.checkpoint import register; register()")
    assert done.returncode == 0, done.stderr
