"""plugins list, show, check and new; and two packages that are really installed, in an environment of their own."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from command_line import call, snapshot, with_fields, write_yaml
from plugin_kit import encoder, put

import ssl_ae
from ssl_ae.testing import checks_for

ROOT = Path(__file__).parents[2]
KSPARSE = ROOT / "plugins" / "ssl-ae-ksparse"
COMMON = {"run": None, "status": "done", "outputs": {}, "metrics": {}, "mlflow_run_id": None, "warnings": []}
SPARSE = {
    "name": "sparse",
    "data": {},
    "model": {"latent_dim": 17, "encoder": {"name": "ksparse", "k": 5}, "decoder": {"name": "linear"}},
    "pretrain": {"epochs": 1, "batch_size": 256},
    "device": "cpu",
}
KINDS = ["encoder", "decoder", "regularizer", "head", "table-head"]


@pytest.fixture
def install(tmp_path_factory, monkeypatch):
    """install(distribution, source, entry_point=...): see plugin_kit.put."""
    folder = tmp_path_factory.mktemp("site")
    monkeypatch.syspath_prepend(folder)
    modules = []
    yield lambda *words, **more: modules.append(put(folder, *words, **more))
    for module in modules:
        sys.modules.pop(module, None)


# -- list -----------------------------------------------------------------------------------------------------------------


def test_list_json_is_the_contract(install):
    install("zinc", encoder("zinc"))
    install("gold", "raise RuntimeError('no licence')")
    found = call("plugins", "list", "--json").json
    assert {name: found[name] for name in COMMON} == COMMON
    assert found["command"] == "plugins list"
    assert set(found) == {*COMMON, "command", "plugins", "components"}
    plugins = {plugin.pop("name"): plugin for plugin in found["plugins"]}
    assert plugins["builtins"] == {
        "distribution": "ssl-ae",
        "version": ssl_ae.__version__,
        "status": "loaded",
        "reason": "",
    }
    assert plugins["zinc"]["status"] == "loaded"
    assert plugins["gold"] == {
        "distribution": "gold",
        "version": "1.2",
        "status": "broken",
        "reason": "RuntimeError: no licence",
    }
    components = {component["full_name"]: component for component in found["components"] if component["kind"] == "encoder"}
    assert components["zinc/zinc"] == {
        "kind": "encoder",
        "name": "zinc",
        "full_name": "zinc/zinc",
        "summary": "Codes of zinc.",
    }
    assert {"builtins/linear", "builtins/mlp", "builtins/conv"} <= set(components)


def test_list_prints_plugins_and_components(install, monkeypatch):
    install("gold", "raise RuntimeError('no licence')")
    text = call("plugins", "list").stdout
    assert "gold  (gold 1.2)  broken: RuntimeError: no licence" in text.splitlines()
    assert "builtins/kl" in text
    monkeypatch.setenv("SSL_AE_PLUGINS", "builtins")
    assert "gold  (gold 1.2)  disabled: not named in SSL_AE_PLUGINS" in call("plugins", "list").stdout.splitlines()


def test_list_refuses_two_owners_of_one_name(install):
    install("lead", encoder("lead"), entry_point="metal")
    install("iron", encoder("iron"), entry_point="metal")
    answer = call("plugins", "list")
    assert answer.code == 2
    assert answer.stderr.startswith("error: two distributions register the plugin name 'metal': ")


# -- show -----------------------------------------------------------------------------------------------------------------


def test_show_tells_the_options(install):
    (found,) = call("plugins", "show", "builtins/gaussian_noise", "--json").json["components"]
    assert found == {
        "kind": "regularizer",
        "name": "gaussian_noise",
        "full_name": "builtins/gaussian_noise",
        "summary": found["docstring"].splitlines()[0],
        "version": 1,
        "plugin": {"name": "builtins", "distribution": "ssl-ae", "version": ssl_ae.__version__},
        "docstring": found["docstring"],
        "class": "ssl_ae_builtins.noise.GaussianNoise",
        "declares": {"verbs": ["perturb"], "always": False, "of_samples": False},
        "options": [
            {
                "name": "scale",
                "type": "float",
                "range": ">= 0",
                "required": False,
                "default": 0.3,
                "description": "standard deviation, in units of the layer",
            },
            {
                "name": "layers",
                "type": "list of str or null",
                "range": "",
                "required": False,
                "default": ["input"],
                "description": "names of layers it acts on, `h*` for all hidden ones",
            },
        ],
    }
    assert "Vincent et al. 2010" in found["docstring"]


def test_show_tells_what_the_engine_reads_of_a_penalty():
    answer = call("plugins", "show", "kl")
    assert "  weight: float (>= 0); default 1.0" in answer.stdout
    assert "  warmup_steps: int (>= 0); default 0" in answer.stdout
    assert "layers" not in answer.stdout  # kl acts on the posterior, not on layers


def test_show_a_name_of_several_kinds_shows_each():
    answer = call("plugins", "show", "mlp")
    assert answer.code == 0
    heads = [line for line in answer.stdout.splitlines() if line.startswith("builtins/mlp  (")]
    owner = f"ssl-ae {ssl_ae.__version__}"
    assert heads == [f"builtins/mlp  ({kind}, {owner})" for kind in ("encoder", "decoder", "head")]
    assert "  widths: list of int >= 1 or auto; default [512, 256]\n      sizes of the hidden layers" in answer.stdout
    assert "  posterior: point | diag | full; default point" in answer.stdout


@pytest.mark.parametrize("command", ["show", "check"])
def test_an_unknown_name_gets_the_nearest_match(command):
    answer = call("plugins", command, "sparse_l2")
    assert answer.code == 2
    assert answer.stderr.startswith("error: nothing is called 'sparse_l2'. Did you mean sparse_l1?")
    assert answer.stdout == ""


def test_show_a_plugin_and_a_component_of_a_broken_one(install):
    install("gold", "raise RuntimeError('no licence')")
    assert "'builtins' is a plugin, not a component" in call("plugins", "show", "builtins").stderr
    answer = call("plugins", "show", "gold/gold")
    assert answer.code == 2
    assert answer.stderr == "error: plugin 'gold' (gold 1.2) is broken: RuntimeError: no licence.\n"


# -- check ----------------------------------------------------------------------------------------------------------------


def test_check_a_component_that_keeps_the_contract(install):
    install("zinc", encoder("zinc"))
    found = call("plugins", "check", "zinc", "--json").json
    assert {name: found[name] for name in COMMON} == COMMON
    assert (found["command"], found["passed"], found["failures"]) == ("plugins check", True, [])
    (component,) = found["components"]
    assert component["full_name"] == "zinc/zinc"
    assert {"builds", "row_law", "trains"} <= {check["name"] for check in component["checks"]}
    assert all(check == {"name": check["name"], "passed": True, "message": ""} for check in component["checks"])
    assert call("plugins", "check", "zinc/zinc").stdout.startswith("ok      encoder zinc/zinc: 22 of 22 checks")


def test_check_says_which_check_failed_and_why(install):
    noisy = encoder("noisy").replace(
        "@ssl_ae",
        "    def forward(self, x, run):\n        return ssl_ae.Point(super().forward(x + x.mean(0), run).mean)\n\n@ssl_ae",
    )
    install("noisy", noisy)
    answer = call("plugins", "check", "noisy")
    assert answer.code == 1
    assert answer.stdout == "FAILED  encoder noisy/noisy: 21 of 22 checks\n"
    assert "encoder Noisy breaks the contract (row_law)." in answer.stderr
    answer = call("plugins", "check", "noisy", "--json")
    assert answer.code == 1
    (line,) = answer.stdout.splitlines()
    found = json.loads(line)
    assert found["passed"] is False
    assert [check["name"] for check in found["components"][0]["checks"] if not check["passed"]] == ["row_law"]
    (failure,) = found["failures"]
    assert "\n  cure:     use statistics of the row alone" in failure


def test_check_a_plugin_that_cannot_be_used(install, monkeypatch):
    install("gold", "raise RuntimeError('no licence')")
    answer = call("plugins", "check", "gold")
    assert answer.code == 1
    assert "plugin 'gold' (gold 1.2) is broken: RuntimeError: no licence." in answer.stderr
    monkeypatch.setenv("SSL_AE_PLUGINS", "builtins")
    answer = call("plugins", "check", "gold")
    assert answer.code == 2
    assert answer.stderr == "error: plugin 'gold' (gold 1.2) is disabled: not named in SSL_AE_PLUGINS.\n"


# -- new ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_new_writes_a_component_that_keeps_the_contract(here, monkeypatch, kind):
    name = f"my-{kind}"
    answer = call("plugins", "new", name, "--kind", kind, "--out", "there", "--json").json
    folder = here / "there" / f"ssl-ae-{name}"
    assert answer["outputs"] == {"package": f"there/ssl-ae-{name}"}
    module = f"ssl_ae_my_{kind.replace('-', '_')}"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "pyproject.toml",
        "README.md",
        f"{module}.py",
        "tests/test_contract.py",
    }
    monkeypatch.syspath_prepend(folder)
    plugin = __import__(module)
    hook = f"ssl_ae_{kind.split('-')[-1]}s"
    (cls,) = getattr(plugin, hook)()
    assert cls.name == name
    for _, check in checks_for(cls):
        check()
    rules = ["--isolated", "--no-cache", "--line-length", "130", "--extend-select", "E,W,I,B,UP,RET"]
    style = subprocess.run([sys.executable, "-m", "ruff", "check", *rules], cwd=folder, text=True, capture_output=True)
    assert style.returncode == 0, style.stdout


REFUSED = {
    "Top": "NAME = 'Top': expected lower-case letters and digits",
    "top/k": "NAME = 'top/k': expected",
    "2top": "NAME = '2top': expected",
    "top__k": "NAME = 'top__k': expected",
    "top k": "NAME = 'top k': expected",
    "builtins": f"NAME = 'builtins': ssl-ae {ssl_ae.__version__} is installed under this name. Choose another.",
    "taken": "ssl-ae-taken exists. Choose another NAME, or another place with --out.",
}


@pytest.mark.parametrize("name", REFUSED)
def test_new_refuses(here, name):
    (here / "ssl-ae-taken").mkdir()
    before = snapshot(here)
    answer = call("plugins", "new", name)
    assert answer.code == 2
    assert answer.stderr.startswith(f"error: {REFUSED[name]}")
    assert answer.stdout == ""
    assert snapshot(here) == before


def test_new_refuses_an_unknown_kind_and_a_place_that_is_a_file(here):
    assert call("plugins", "new", "topk", "--kind", "brain").code == 2
    (here / "file").write_text("")
    answer = call("plugins", "new", "topk", "--out", "file")
    assert answer.code == 2
    assert answer.stderr.startswith("error: cannot create the folder file")


# -- packages in an environment of their own ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh virtual environment that sees the packages of this one, with the two packages pip-installed into it.

    Returns (run, packages): run(*words) is `python WORDS` in it.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"

    def run(*words, **more):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            [python, *map(str, words)], text=True, capture_output=True, env=environment | {"SSL_AE_TRACKING": "journal"}, **more
        )

    (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # addsitedir, because a bare path would leave out editable installations, which are .pth files themselves
    (own / "parent.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()))
    packages = folder / "packages"
    shutil.copytree(KSPARSE, packages / KSPARSE.name)  # setuptools builds inside the source folder
    assert run("-m", "ssl_ae", "plugins", "new", "top_k", "--out", packages).returncode == 0
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    installed = run("-m", "pip", "install", *options, *sorted(packages.iterdir()))
    assert installed.returncode == 0, installed.stderr
    return run, packages


def test_installed_packages_are_listed(environment):
    run, _ = environment
    found = json.loads(run("-m", "ssl_ae", "plugins", "list", "--json").stdout)
    plugins = {(plugin["name"], plugin["distribution"], plugin["version"], plugin["status"]) for plugin in found["plugins"]}
    assert plugins >= {("ksparse", "ssl-ae-ksparse", "0.1.0", "loaded"), ("top_k", "ssl-ae-top_k", "0.1.0", "loaded")}
    assert {"ksparse/ksparse", "top_k/top_k"} <= {component["full_name"] for component in found["components"]}


def test_ksparse_trains_by_name(environment, digits, tmp_path):
    run, _ = environment
    recipe = write_yaml(tmp_path / "sparse.yaml", with_fields(SPARSE, {"data.path": str(digits)}))
    done = run("-m", "ssl_ae", "pretrain", recipe, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["status"] == "done"
    kept = (tmp_path / "runs" / "sparse" / "recipe.yaml").read_text()
    assert "name: ksparse/ksparse" in kept
    assert "ssl-ae-ksparse 0.1.0" in kept


def test_ksparse_refuses_more_units_than_there_are(install, here, digits):
    install("ksparse", (KSPARSE / "ssl_ae_ksparse.py").read_text())
    recipe = write_yaml(here / "sparse.yaml", with_fields(SPARSE, {"data.path": str(digits), "model.encoder.k": 18}))
    answer = call("pretrain", recipe)
    assert answer.code == 2
    assert "model.encoder.k = 18: at most model.latent_dim = 17 units can be active. Lower k" in answer.stderr
    assert not (here / "runs").exists()


@pytest.mark.parametrize("name", ["ksparse", pytest.param("top_k", marks=pytest.mark.slow)])
def test_installed_packages_keep_the_contract(environment, name):
    run, _ = environment
    answer = run("-m", "ssl_ae", "plugins", "check", name)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == f"ok      encoder {name}/{name}: 22 of 22 checks\n"


def test_their_own_tests_pass(environment):
    run, packages = environment
    answer = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", packages, cwd=packages)
    assert answer.returncode == 0, answer.stdout
    assert "44 passed" in answer.stdout
