"""`ssl-ae doctor`: it finds what is broken, names the cure, and works where hardly anything else does."""

import json
import subprocess
import sys
from importlib import metadata

import plugin_kit
import pytest
from command_line import call

from ssl_ae import distributed
from ssl_ae.doctor import checks, trial
from ssl_ae.training import Trainer

COMMON = {"command", "run", "status", "outputs", "metrics", "mlflow_run_id", "warnings"}
CHECKS = ["versions", "devices", "plugins", "store", "disk", "self-test"]


def doctor(code: int) -> dict:
    answer = call("doctor", "--json")
    assert answer.code == code, answer.stdout
    (line,) = answer.stdout.splitlines()
    report = json.loads(line)
    assert report.keys() == COMMON | {"healthy", "executable", "checks"}
    assert list(report["checks"]) == CHECKS
    assert report["healthy"] == (code == 0)
    return report


@pytest.fixture
def quick(monkeypatch):
    """For tests that look at another check."""
    found = trial.Trial("cpu", 100, 70.0, 60.0, True, 100, 1.0, 10)
    monkeypatch.setattr(trial, "run_trial", lambda: found)


def test_a_healthy_machine(here):
    report = doctor(0)
    assert {check["status"] for check in report["checks"].values()} == {"ok"}, report
    assert report["warnings"] == []
    assert report["checks"]["versions"]["facts"]["packages"]["torch"] == metadata.version("torch")
    facts = report["checks"]["self-test"]["facts"]
    assert facts["same_bits"]
    assert facts["last_loss"] < facts["first_loss"]
    assert facts["accuracy"] > 0.9  # chance is 0.1; the classes lie far apart
    assert facts["seconds"] < 60  # 1 s on an idle core
    assert report["metrics"]["self-test/accuracy"] == facts["accuracy"]
    assert list(here.iterdir()) == []


def test_what_a_person_reads(here, quick, monkeypatch):
    answer = call("doctor")
    assert answer.code == 0
    lines = [line for line in answer.stdout.splitlines() if line and not line.startswith(" ")]
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", name] for name in CHECKS]
    assert lines[-1] == "ssl-ae works here."
    assert max(map(len, answer.stdout.splitlines())) <= 110

    monkeypatch.setenv("SSL_AE_TRACKING", "live")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///srv/mlruns")
    answer = call("doctor")
    assert answer.code == 1
    assert "BROKEN  store" in answer.stdout
    assert "Use an SQLite file" in answer.stdout
    assert answer.stdout.endswith("\nbroken: store\n")


def without_torch(start: str) -> tuple[dict, str]:
    """The report of a process that runs `start` first, and what it had imported in the end."""
    script = f"import sys; sys.argv = ['ssl-ae', 'doctor', '--json']\n{start}\nfrom ssl_ae.cli import main\n"
    script += "try: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()[-1]


def test_without_torch_everything_else_is_looked_at(here, monkeypatch):
    monkeypatch.setenv("SSL_AE_TRACKING", "live")
    report, modules = without_torch("sys.modules['torch'] = None")
    status = {name: check["status"] for name, check in report["checks"].items()}
    assert status == {
        "versions": "ok",  # it is installed, and cannot be imported
        "devices": "broken",
        "plugins": "skipped",
        "store": "ok",
        "disk": "ok",
        "self-test": "skipped",
    }
    assert "torch cannot be imported: ModuleNotFoundError" in report["checks"]["devices"]["text"]
    assert "pytorch.org" in report["checks"]["devices"]["cures"][0]
    assert not {"mlflow", "pandas", "numpy"} & set(modules.split())


def test_a_torch_that_lacks_a_library_of_the_system_is_no_traceback(here):
    hook = """
class Broken:
    def find_spec(self, name, *rest):
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file")
sys.meta_path.insert(0, Broken())
"""
    report, _ = without_torch(hook)
    assert "OSError: libcudart.so.12" in report["checks"]["devices"]["text"]


def test_packages_out_of_their_range_or_absent(here, quick, monkeypatch):
    needed = ["pluggy>=99", "torch>=1", "no-such-package-at-all>=1", "faiss-cpu>=99; extra == 'faiss'"]
    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    versions = doctor(1)["checks"]["versions"]
    assert "1 of 3 packages within their range" in versions["text"]
    outside, absent = versions["cures"]
    assert outside.startswith("pluggy ")
    assert outside.endswith("is outside >=99: pip install 'pluggy>=99'")
    assert absent == "no-such-package-at-all is not installed: pip install 'no-such-package-at-all>=1'"


def test_a_release_that_is_not_the_pinned_one_is_told_and_a_build_of_it_is_not(here, quick, monkeypatch, tmp_path):
    (tmp_path / "pins.txt").write_text(
        f"torch=={metadata.version('torch').split('+')[0]} ; sys_platform == 'linux'\npluggy==0.1\n"
    )
    monkeypatch.setattr(checks, "PINS", tmp_path / "pins.txt")
    text = doctor(0)["checks"]["versions"]["text"]
    assert text.endswith(f"; not as pinned: pluggy {metadata.version('pluggy')} (tested with 0.1)")


def test_a_broken_plugin_is_named_with_its_reason(here, quick, monkeypatch):
    monkeypatch.syspath_prepend(here)
    plugin_kit.put(here, "shaky", "import no_such_module_anywhere")
    plugins = doctor(1)["checks"]["plugins"]
    assert plugins["status"] == "broken"
    (cure,) = plugins["cures"]
    assert cure == "plugin shaky (shaky 1.2) is broken: ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    assert plugins["facts"]["plugins"]["builtins"]["status"] == "loaded"


def test_two_plugins_of_one_name_are_broken_and_the_rest_is_looked_at(here, quick, monkeypatch):
    monkeypatch.syspath_prepend(here)
    for distribution in ("one", "two"):
        plugin_kit.put(here, distribution, plugin_kit.encoder(distribution), entry_point="same")
    report = doctor(1)
    assert "two distributions register the plugin name 'same'" in report["checks"]["plugins"]["text"]
    assert report["checks"]["self-test"]["status"] == "ok"


def test_a_store_that_does_not_answer(here, quick, monkeypatch):
    monkeypatch.setenv("SSL_AE_TRACKING", "live")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@127.0.0.1:9")  # the port `discard`, where nobody listens
    store = doctor(1)["checks"]["store"]
    assert store["text"] == "http://127.0.0.1:9 does not answer: Connection refused"
    assert "ssl-ae track sync" in store["cures"][0]


@pytest.mark.parametrize(("free", "status", "code"), [(0.1, "broken", 1), (1.0, "warning", 0)])
def test_a_disk_that_is_nearly_full(here, quick, monkeypatch, free, status, code):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free * checks.GB}))
    disk = doctor(code)["checks"]["disk"]
    assert disk["status"] == status
    assert "nearly full" in disk["cures"][0]


@pytest.mark.parametrize(("native", "taken"), [(True, "bf16"), (False, "fp32")])
def test_which_precision_auto_takes(here, quick, monkeypatch, native, taken):
    monkeypatch.setattr(distributed, "computes_bf16", lambda device: native)
    devices = doctor(0)["checks"]["devices"]
    assert devices["facts"]["precision"] == taken
    assert devices["text"].endswith(f"precision: auto {taken}")


def test_more_threads_than_cores(here, quick, monkeypatch):
    monkeypatch.setattr(checks, "usable_cores", lambda: 0.5)
    devices = doctor(0)["checks"]["devices"]
    assert devices["status"] == "warning"
    assert devices["cures"][0].endswith("OMP_NUM_THREADS=1")


def test_a_resume_that_loses_the_optimizers_state_does_not_pass(here, monkeypatch):
    restore = Trainer.restore

    def forgetful(self, checkpoint):
        fresh = [run.optimizer.state_dict() for run in self.runs]
        restore(self, checkpoint)
        for run, state in zip(self.runs, fresh, strict=True):
            run.optimizer.load_state_dict(state)

    monkeypatch.setattr(Trainer, "restore", forgetful)
    found = doctor(1)["checks"]["self-test"]
    assert found["facts"]["same_bits"] is False
    assert "OTHER bits" in found["text"]


def test_a_training_that_learns_nothing_does_not_pass(here, monkeypatch):
    monkeypatch.setattr("ssl_ae.stepping.Stepper.make", lambda self, run, batches, step: None)
    found = doctor(1)["checks"]["self-test"]
    assert "the loss does not fall" in found["cures"][0]
    assert "the head does not learn" in found["cures"][-1]
