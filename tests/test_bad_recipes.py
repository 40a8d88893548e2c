"""Wrong recipes: exit code 2, one message that names place, value, what is allowed and the cure, and no file touched."""

import subprocess
import sys

import pytest
from command_line import call, one_line, refused, spawn, write_yaml


def test_an_unknown_key(recipe):
    path = recipe({"model.latent_dimm": 3})
    assert one_line("pretrain", path) == (
        f"{path}: model.latent_dimm: unknown key; allowed: latent_dim, samples, encoder, decoder, regularizers and head."
        " Did you mean latent_dim?"
    )


def test_a_wrong_type(recipe):
    path = recipe({"model.latent_dim": "many"})
    message = one_line("pretrain", path)
    assert message.startswith(f'{path}: model.latent_dim = "many": expected a valid integer')


def test_a_value_that_is_not_allowed(recipe):
    path = recipe({"finetune.mode": "joined"})
    assert one_line("finetune", path) == (
        f'{path}: finetune.mode = "joined": expected sequential, joint, alternate or end-to-end. Did you mean joint?'
    )


@pytest.mark.parametrize(
    ("labels", "place"),
    [
        ({"per_class": "ten"}, 'data.labels.per_class = "ten": expected a valid integer'),
        ({"per_class": 3, "total": 30}, "data.labels"),
        ({"per_clas": 3}, "data.labels.per_clas: unknown key; allowed: per_class, total and seed. Did you mean per_class?"),
        (7, "data.labels = 7: expected"),
    ],
)
def test_a_budget_of_labels_that_makes_no_sense(recipe, labels, place):
    assert place in one_line("finetune", recipe({"data.labels": labels}))


@pytest.mark.parametrize("stages", [["pretrian"], [{"stage": "pretrian"}]])
def test_a_stage_that_does_not_exist(recipe, stages):
    message = one_line("run", recipe({"stages": stages}))
    assert "stages.0" in message
    assert "Did you mean pretrain?" in message


def test_several_things_wrong_are_one_message_of_a_line_each(recipe):
    path = recipe({"seed": -1, "model.latent_dim": 0, "pretrain.epoch": 3})
    places = [line.split(": ")[1] for line in refused("pretrain", path).splitlines()]
    assert places == ["seed = -1", "model.latent_dim = 0", "pretrain.epoch"]


def test_an_unknown_component(recipe):
    path = recipe({"model.encoder.name": "mpl"})
    message = one_line("pretrain", path)
    assert message.startswith(f"{path}: model.encoder.name = 'mpl': there is no encoder of this name; installed: ")
    assert message.endswith("Did you mean mlp?")


def test_an_unknown_option_of_a_component(recipe):
    path = recipe({"model.encoder.width": [3]})
    message = one_line("pretrain", path)
    assert message.startswith(f"{path}: model.encoder.width: unknown key; allowed: ")
    assert message.endswith("Did you mean widths?")


@pytest.fixture
def second_mlp(here, monkeypatch) -> None:
    """An installed distribution whose plugin also has an encoder called mlp."""
    folder = here / "site"
    (folder / "rival-7.0.dist-info").mkdir(parents=True)
    (folder / "rival-7.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 7.0\n")
    (folder / "rival-7.0.dist-info" / "entry_points.txt").write_text("[ssl_ae]\nrival = rival\n")
    (folder / "rival.py").write_text(
        "import ssl_ae\nfrom ssl_ae_builtins.mlp import MlpEncoder\n"
        "class Mlp(MlpEncoder):\n    name = 'mlp'\n"
        "@ssl_ae.hookimpl\ndef ssl_ae_encoders():\n    return [Mlp]\n"
    )
    (folder / "__pycache__").mkdir()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(folder)


def test_a_short_name_with_two_owners(recipe, second_mlp):
    path = recipe()
    message = one_line("pretrain", path)
    assert message.startswith(f"{path}: model.encoder.name = 'mlp': encoder 'mlp' is ambiguous: builtins/mlp (ssl-ae ")
    assert message.endswith(") and rival/mlp (rival 7.0). Write the full name.")


def test_the_full_name_of_one_of_two_owners_works(recipe, second_mlp):
    assert call("pretrain", recipe({"model.encoder.name": "rival/mlp"}), "--epochs", 1).code == 0


def test_kl_on_a_point(recipe):
    path = recipe({"model.encoder.posterior": "point"})
    assert one_line("pretrain", path) == (
        f"{path}: kl needs a random posterior, but encoder builtins/mlp returns Point. "
        "Set model.encoder.posterior: diag, or remove kl."
    )


def test_bernoulli_on_data_outside_the_unit_interval(recipe, unlabelled):
    path = recipe({"data.path": str(unlabelled)})
    message = one_line("pretrain", path)
    assert message.startswith(
        f"{path}: model.decoder.likelihood = bernoulli: expects values in [0, 1], but data.scale = standard"
    )
    assert message.endswith("Set data.scale: range, or the gaussian likelihood.")


def test_bernoulli_on_pixels_that_are_not_scaled(recipe):
    message = one_line("pretrain", recipe({"data.scale": "none"}))  # the digits' pixels go from 0 to 16
    assert "data.scale = none gives [0, 16]" in message


def test_a_table_head_with_joint(recipe, pretrained):
    message = one_line("finetune", recipe({"model.head.name": "logistic"}), "--joint")
    assert message.startswith("model.head.name = builtins/logistic: is fitted on stored latents")
    assert message.endswith("Take a differentiable head (softmax, mlp), or --sequential.")


def test_a_recipe_that_is_not_there(recipe, here):
    recipe()
    assert one_line("pretrain", here / "recip.yaml") == f"there is no recipe {here}/recip.yaml. Did you mean {here}/recipe.yaml?"


@pytest.mark.parametrize("text", ["model: [1, 2", "a: b: c", "\tname: tiny"])
def test_a_recipe_that_is_no_yaml(here, text):
    (here / "bad.yaml").write_text(text)
    assert one_line("pretrain", "bad.yaml").startswith("bad.yaml is no YAML: ")


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n"])
def test_a_recipe_that_is_no_mapping(here, text):
    (here / "bad.yaml").write_text(text)
    assert one_line("pretrain", "bad.yaml").startswith("bad.yaml: a recipe is a mapping with at least `name` and `data`")


def test_a_recipe_that_is_no_text(here):
    (here / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert one_line("pretrain", "bad.yaml").startswith("bad.yaml cannot be read: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.latent_dim", "--set model.latent_dim: expected KEY=VALUE, as in --set model.latent_dim=16."),
        ("=3", "--set =3: expected KEY=VALUE, as in --set model.latent_dim=16."),
        ("seed.x=3", "--set seed.x=3: seed is 0, which has no fields. Set seed itself."),
        ("model.regularizers.7.weight=3", "'7' is no position in a list of 1; positions start at 0."),
        ("model.latent_dim=[", "--set model.latent_dim=[: the value is no YAML: "),
        ("model.latentdim=3", "Did you mean latent_dim?"),
    ],
)
def test_an_override_that_cannot_be(recipe, text, message):
    assert message in one_line("pretrain", recipe({"seed": 0}), "--set", text)


def test_no_epochs(recipe):
    assert "pretrain.epochs = 0: expected greater than or equal to 1." in one_line("pretrain", recipe(), "--epochs", 0)


def test_a_device_that_this_machine_lacks(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = one_line("pretrain", recipe({"device": "cuda"}))
    assert message.startswith("device = cuda: torch finds none on this machine; available: ")


# As users meet it: a process of its own


def test_the_process_says_the_same(recipe, here):
    path = recipe({"model.encoder.posterior": "point"})
    assert refused("pretrain", path, by=spawn) == one_line("pretrain", path)


def test_a_flag_that_does_not_exist(recipe):
    answer = call("pretrain", recipe(), "--epoch", "3")
    assert answer.code == 2
    assert "No such option: --epoch" in answer.stderr


def test_recipes_are_refused_before_torch_is_imported(here):
    path = write_yaml(here / "recipe.yaml", {"name": "tiny", "data": {"path": "data"}, "pretrain": {"epoch": 3}})
    code = f"""
import sys
sys.argv = ["ssl-ae", "pretrain", {str(path)!r}]
from ssl_ae.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, "mlflow" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "False False\n")
