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


def test_registering_twice_is_safe():
    done = run("import slimrank; from slimrank.checkpoint import register; register()")
    assert done.returncode == 0, done.stderr
