"""What a command imports before it does anything: a start is as quick as what it leaves for later."""

import gc
import subprocess
import sys

import pytest

from ssl_ae.cli.options import many_imports

SLOW = {"torch", "numpy", "mlflow", "sklearn", "scipy", "pandas", "matplotlib", "pyarrow", "PIL", "webdataset"}
REPORT = "print(*sorted({name.split('.')[0] for name in sys.modules}))"


def imported(start: str, *words: object, code: int = 0, report: str = REPORT) -> set[str]:
    """The packages that a process has imported when `ssl-ae WORDS` ends."""
    script = f"import sys; sys.argv = {['ssl-ae', *map(str, words)]!r}\n{start}\ntry: main()\nfinally: {report}"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == code, found.stderr
    return set(found.stdout.splitlines()[-1].split())


def test_errors_of_a_recipe_come_without_torch(recipe):
    start = "from ssl_ae.cli import main"
    for command in ("pretrain", "finetune", "run"):
        assert not imported(start, command, recipe(), "--set", "pretrain.epoch=3", code=2) & SLOW
    assert not imported(start, "pretrain", "absent.yaml", code=2) & SLOW


def test_a_recipe_is_shown_without_torch_where_its_data_is_not_there_yet(recipe):
    assert not imported("from ssl_ae.cli import main", "recipe", "show", recipe({"data.path": "later"})) & SLOW


@pytest.mark.parametrize("tracking", ["live", "journal"])
def test_the_first_step_needs_torch_and_little_else(recipe, monkeypatch, tracking):
    """Neither what delivers, draws or fits tables, nor torch's compiler, which torch's optimizers import by themselves."""
    monkeypatch.setenv("SSL_AE_TRACKING", tracking)
    start = "import os\nfrom ssl_ae.cli import main\nfrom ssl_ae.stages.training_run import Teller\n"
    start += "Teller.stepped = lambda *_: (print(*sys.modules), sys.stdout.flush(), os._exit(0))"
    found = imported(start, "pretrain", recipe())
    assert {"torch", "numpy", "ssl_ae.training"} <= found
    assert not found & (SLOW - {"torch", "numpy"} | {"torch._dynamo", "sympy"})


def test_training_to_its_end_never_imports_torchs_compiler(recipe):
    """Nor do the checkpoints, which read the optimizer's state."""
    found = imported("from ssl_ae.cli import main", "pretrain", recipe(), report="print(*sys.modules)")
    assert "ssl_ae.checkpoint" in found
    assert "torch._dynamo" not in found


def test_garbage_is_collected_again_after_the_imports(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    gc.unfreeze()
    with many_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_where_torch_is_there_already_nothing_is_set_aside_for_good():
    pytest.importorskip("torch")
    gc.unfreeze()
    with many_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0
