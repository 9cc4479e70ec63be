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


def test_import_touches_no_device_loads_nothing_heavy_and_registers_twice():
    done = run(
        NO_DEVICE + "import sys, torch, transformers.quantizers.auto\nbefore = set(sys.modules)\n"
        "import slimrank\nnew = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "heavy = {'datasets', 'gguf', 'peft', 'typer', 'matplotlib', 'lm_eval'}\n"
        "print(sorted(new & (heavy | {'onnx', 'onnxscript', 'onnxruntime', 'openvino'})))\n"
        "from slimrank.checkpoint import register\nregister()"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_touches_no_device_and_loads_no_plots_and_no_statistics():
    done = run(
        NO_DEVICE + "import sys\nimport slimrank.cli\n"
        "for words in (['--help'], ['analyze', '--help']):\n"
        "    sys.argv = ['slimrank', *words]\n"
        "    try: slimrank.cli.main()\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'matplotlib', 'scipy.stats', 'onnxruntime', 'openvino'} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout
    assert "analysis.json" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
