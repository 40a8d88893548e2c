"""The grammar of recipes: defaults, overrides, and messages that say place, value, what is allowed and the nearest match."""

import pytest
import yaml

from ssl_ae import recipe as recipes
from ssl_ae.errors import RecipeError
from ssl_ae.recipe import LabelBudget, Recipe, Stage, load, parse, to_yaml, with_fields

LEAST = {"name": "a", "data": {"path": "data/a"}}

FULL = """
name: mnist-vae
seed: 0
data:
  path: data/mnist
  labels: {per_class: 10, seed: 0}
model:
  latent_dim: 32
  encoder: {name: mlp, widths: [512, 256], posterior: diag}
  decoder: {name: mlp, likelihood: bernoulli}
  regularizers: [{name: kl, weight: 1.0, warmup_steps: 500}]
  head: {name: softmax}
pretrain: {epochs: 30, batch_size: 256, optimizer: {name: adamw, lr: 1e-3}, schedule: {name: cosine}}
finetune: {mode: sequential, alpha: 0.01, epochs: 20, batch_size: 256, labeled_fraction: 0.25}
device: auto
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(FULL)
    return path


def refusal(tree) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(tree, "a.yaml")
    return str(caught.value)


def test_the_recipe_of_the_design(path):
    recipe = load(path)
    assert recipe.data.labels == LabelBudget(per_class=10, seed=0)
    assert recipe.model.encoder.options == {"widths": [512, 256], "posterior": "diag"}
    assert recipe.model.regularizers[0].warmup_steps == 500
    assert recipe.pretrain.optimizer.lr == 0.001  # YAML 1.1 reads 1e-3 as text


def test_two_keys_are_enough():
    recipe = parse(LEAST)
    assert (recipe.data.labels, recipe.finetune.mode, recipe.model.encoder.name) == ("all", "sequential", "mlp")
    assert recipe.stages == ("pretrain", "extract", "finetune", "evaluate")
    assert (recipe.pretrain.epochs, recipe.finetune.epochs) == (30, 20)


def test_what_is_written_reads_back_as_the_same(path):
    recipe = load(path)
    assert parse(yaml.safe_load(to_yaml(recipe.model_dump(mode="json")))) == recipe


def test_recipes_do_not_change(path):
    recipe = load(path)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("model.latent_dim=16", "model.latent_dim", 16),
        ("pretrain.optimizer.lr=1e-2", "pretrain.optimizer.lr", 0.01),
        ("finetune.clip_norm=5", "finetune.clip_norm", 5.0),
        ("finetune.clip_norm=null", "finetune.clip_norm", None),
        ("data.labels=all", "data.labels", "all"),
        ("data.labels=labels.csv", "data.labels", "labels.csv"),
        ("data.labels={total: 100, seed: 3}", "data.labels", LabelBudget(total=100, seed=3)),
        ("data.labels.seed=7", "data.labels", LabelBudget(per_class=10, seed=7)),
        ("compile=true", "compile", True),
        ("stages=[pretrain]", "stages", ("pretrain",)),
        (" seed =5", "seed", 5),
    ],
)
def test_overrides(path, override, place, value):
    found = load(path, [override])
    for part in place.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_overrides_of_components_and_lists(path):
    recipe = load(path, ["model.encoder.widths=[7]", "model.regularizers.0.weight=0.5", "model.head.name=mlp"])
    assert recipe.model.encoder.options["widths"] == [7]
    assert recipe.model.regularizers[0].weight == 0.5
    assert recipe.model.head.name == "mlp"


def test_an_override_of_what_an_anchor_puts_at_two_places_holds_at_one(path):
    path.write_text("name: a\ndata: {path: data/a}\npretrain: &same {epochs: 3, optimizer: {lr: 0.1}}\nfinetune: *same\n")
    found = load(path, ["finetune.mode=joint", "finetune.optimizer.lr=0.2"])
    assert (found.finetune.mode, found.finetune.epochs, found.finetune.optimizer.lr) == ("joint", 3, 0.2)
    assert (found.pretrain.epochs, found.pretrain.optimizer.lr) == (3, 0.1)


def test_the_last_override_holds(path):
    assert load(path, ["seed=3", "seed=5"]).seed == 5


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "a"}, "a.yaml: data: is missing."),
        ({"name": "a", "data": {}}, "a.yaml: data.path: is missing."),
        ({**LEAST, "modle": {}}, "Did you mean model?"),
        ({**LEAST, "name": "a/b"}, 'a.yaml: name = "a/b": '),
        ({**LEAST, "seed": 1.5}, "a.yaml: seed = 1.5: expected a valid integer, got a number with a fractional part."),
        ({**LEAST, "seed": None}, "a.yaml: seed = None: expected a valid integer."),
        ({**LEAST, "model": {"regularizers": [{"name": "kl"}, {"weight": 3}]}}, "a.yaml: model.regularizers.1.name: is missing."),
        (
            {**LEAST, "model": {"regularizers": [{"name": "kl", "weight": -1}]}},
            "a.yaml: model.regularizers.0.weight = -1: expected greater",
        ),
        ({**LEAST, "pretrain": {"optimizer": {"lr": 0}}}, "a.yaml: pretrain.optimizer.lr = 0: expected greater than 0."),
        (
            {**LEAST, "pretrain": {"optimizer": {"beta": 0}}},
            "allowed: name, lr, weight_decay, momentum and betas. Did you mean betas?",
        ),
        ({**LEAST, "pretrain": {"optimizer": {"name": "adamx"}}}, "expected adamw, adam or sgd. Did you mean adam?"),
        ({**LEAST, "pretrain": {"early_stopping": {"patient": 3}}}, "allowed: metric and patience. Did you mean patience?"),
        ({**LEAST, "finetune": {"alpha": "-0.1"}}, 'a.yaml: finetune.alpha = "-0.1": expected greater than or equal to 0.'),
        (
            {**LEAST, "stages": ["pretrain", "tune"]},
            'a.yaml: stages.1 = "tune": expected pretrain, extract, finetune, predict or evaluate.',
        ),
        (
            {**LEAST, "stages": [{"stage": "finetune", "sets": {}}]},
            "a.yaml: stages.0.sets: unknown key; allowed: stage and set. Did you mean set?",
        ),
        ({**LEAST, "data": {"path": "a", "labels": {"per_class": 3, "total": 5}}}, "give either per_class or total"),
        ({**LEAST, "data": {"path": "a", "labels": {}}}, "give either per_class or total"),
        ({**LEAST, "device": "gpu"}, 'a.yaml: device = "gpu": expected auto, cpu, cuda or mps.'),
    ],
)
def test_messages(tree, message):
    found = refusal(tree)
    assert message in found
    assert "\n" not in found


def test_a_stage_may_change_fields():
    recipe = parse({**LEAST, "stages": ["pretrain", {"stage": "finetune", "set": {"finetune.mode": "joint"}}]})
    assert recipe.stages[1] == Stage(stage="finetune", set={"finetune.mode": "joint"})
    changed = with_fields(recipe, recipe.stages[1].set)
    assert changed.finetune.mode == "joint"
    assert changed.model_copy(update={"finetune": recipe.finetune}) == recipe


def test_unknown_fields_of_a_stage_are_named():
    with pytest.raises(RecipeError, match=r"finetune\.mood: unknown key"):
        with_fields(parse(LEAST), {"finetune.mood": "joint"}, "a.yaml: stages")


def test_the_schema_has_a_description_of_every_section():
    schema = Recipe.model_json_schema()
    assert schema["properties"]["name"]["description"]
    for section in ("Data", "LabelBudget", "Optimizer", "Schedule", "Pretrain", "Finetune"):
        undescribed = {
            name
            for name, entry in schema["$defs"][section]["properties"].items()
            if "description" not in entry and "$ref" not in entry and "enum" not in entry and "anyOf" not in entry
        }
        assert undescribed <= {"seed"}, section


def test_a_near_recipe_is_suggested(tmp_path, path):
    with pytest.raises(RecipeError, match=r"Did you mean .*a\.yaml\?"):
        recipes.load(tmp_path / "a.yml")
