"""recipe show and recipe schema."""

import json

import yaml
from command_line import call

from ssl_ae.recipe import Recipe


def test_show_says_every_default_and_full_names(recipe):
    tree = yaml.safe_load(call("recipe", "show", recipe()).stdout)
    assert tree["seed"] == 0
    assert tree["pretrain"]["optimizer"]["betas"] == [0.9, 0.999]
    assert tree["model"]["encoder"]["name"] == "builtins/mlp"
    assert tree["model"]["decoder"]["widths"] == [17]
    assert tree["model"]["regularizers"][0]["weight"] == 1.0
    assert tree["components"]["head builtins/softmax"]["version"] == 1


def test_show_takes_overrides(recipe):
    answer = call("recipe", "show", recipe(), "--set", "model.latent_dim=3", "--set", "pretrain.optimizer.lr=1e-2", "--json")
    tree = answer.json["recipe"]
    assert (tree["model"]["latent_dim"], tree["pretrain"]["optimizer"]["lr"]) == (3, 0.01)


def test_what_it_shows_is_a_recipe_for_the_same_run(recipe, pretrained, here):
    (here / "shown.yaml").write_text(call("recipe", "show", recipe()).stdout)
    assert call("pretrain", "shown.yaml", "--json").json["status"] == "skipped"


def test_show_without_the_data(recipe, here):
    answer = call("recipe", "show", recipe({"data.path": "later"}))
    assert answer.stderr == "note: later is not there yet, so the components' own options are shown as given.\n"
    assert yaml.safe_load(answer.stdout)["model"]["encoder"] == {"name": "mlp", "widths": [17], "posterior": "diag"}


def test_the_schema_describes_recipes(here):
    schema = json.loads(call("recipe", "schema").stdout)
    assert schema == Recipe.model_json_schema()
    assert set(schema["required"]) == {"name", "data"}
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Finetune"]["properties"]["alpha"]["description"] == "weight of l_X beside l_Y in joint mode"
    assert call("recipe", "schema", "--out", "schema.json").code == 0
    assert json.loads((here / "schema.json").read_text()) == schema
