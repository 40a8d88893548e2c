"""`--help`: quick, and with an example for every command."""

import os
import resource
import subprocess
import sys

import pytest
from command_line import call

import ssl_ae

COMMANDS = [
    ["data", "pack"], ["data", "inspect"], ["data", "list"], ["pretrain"], ["extract"], ["finetune"], ["evaluate"],
    ["predict"], ["reconstruct"], ["sample"], ["run"], ["search"], ["recipe", "show"], ["recipe", "schema"],
    ["track", "sync"], ["ui"], ["doctor"], ["suggest"], ["label-curve"],
]  # fmt: skip


def processor_seconds(code: str) -> tuple[float, str]:
    """What a fresh interpreter takes for `code`, and what it printed; its modules are compiled, as installed ones are."""
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=compiled)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, found.stdout


def test_help_costs_little_and_imports_nothing_heavy():
    code = "import sys; sys.argv = ['ssl-ae', '--help']\n"
    code += "from ssl_ae.cli import main\ntry: main()\nfinally: print(sorted(sys.modules))"
    # Beside what a program with Typer cannot go below, in turns, the best of each: a number of seconds would be a bound on the
    # machine and on what else runs there. The 0.3 s that are promised hold wherever such an import takes 0.15.
    turns = [(*processor_seconds(code), processor_seconds("import typer")[0]) for _ in range(5)]
    helps, answers, imports = zip(*turns, strict=True)
    assert min(helps) < 2 * min(imports)
    for module in ("torch", "mlflow", "sklearn", "pydantic", "pyarrow", "matplotlib"):
        assert f"'{module}'" not in answers[0]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_by_example(command):
    answer = call(*command, "--help")
    assert answer.code == 0
    assert f"ssl-ae {' '.join(command)}" in answer.stdout
    assert call(*command, "-h").stdout == answer.stdout


def test_the_top_names_every_command():
    found = call("--help").stdout
    names = "data pretrain extract finetune evaluate predict reconstruct run search suggest label-curve plugins recipe track ui"
    names += " doctor"
    for command in names.split():
        assert f"  {command} " in found


def test_no_command_is_a_question():
    answer = call()
    assert "ssl-ae data pack photos/ data/photos" in answer.stdout + answer.stderr


def test_the_version():
    assert call("--version").stdout == f"ssl-ae {ssl_ae.__version__}\n"


def test_a_command_that_does_not_exist():
    answer = call("pretrian")
    assert answer.code == 2
    assert "No such command 'pretrian'" in answer.stderr
