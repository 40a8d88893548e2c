"""A recipe against plugins and data: what is completed, and every complaint before step 0."""

import pytest

from ssl_ae.data.card import Card, X, Y
from ssl_ae.errors import PluginError, RecipeError
from ssl_ae.recipe import parse
from ssl_ae.registry import Registry
from ssl_ae.resolve import resolve

REGISTRY = Registry.discover()
IMAGE = X(kind="image", dtype="uint8", shape=(1, 5, 7), range=(0, 255))
VECTOR = X(kind="vector", dtype="float32", shape=(11,), range=(-3, 8), mean=(0.0,) * 11, std=(1.0,) * 11)
CLASSES = Y(task="classes", names=("a", "b", "c"))
TARGETS = Y(task="regression", names=("u", "v"))


def resolved(model=None, x=IMAGE, y=CLASSES, **fields):
    card = Card(name="d", x=x, y=y, splits={})
    return resolve(parse({"name": "a", "data": {"path": "d"}, "model": model or {}, **fields}), REGISTRY, card, "a.yaml")


def complaints(*args, **kwargs) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolved(*args, **kwargs)
    return str(caught.value).splitlines()


def test_shapes_come_from_the_card_and_the_code_from_the_recipe():
    shapes = resolved({"latent_dim": 13}).shapes
    assert (shapes.x, shapes.latent, shapes.classes, shapes.targets) == ((1, 5, 7), 13, 3, None)
    shapes = resolved({"head": {"name": "gaussian"}}, y=TARGETS).shapes
    assert (shapes.classes, shapes.targets) == (None, 2)


def test_options_are_completed_and_names_are_full():
    tree = resolved({"encoder": {"name": "mlp", "widths": [17, 13]}}).as_dict()
    assert tree["model"]["encoder"]["name"] == "builtins/mlp"
    assert tree["model"]["encoder"]["posterior"] == "point"
    assert tree["model"]["decoder"]["widths"] == [13, 17]  # the encoder's, mirrored
    assert tree["components"].keys() == {"encoder builtins/mlp", "decoder builtins/mlp", "head builtins/softmax"}


def test_a_resolved_recipe_resolves_to_itself():
    model = {"encoder": {"name": "mlp", "widths": [17]}, "regularizers": [{"name": "gaussian_noise"}]}
    first = resolved(model).as_dict()
    again = resolve(parse(first), REGISTRY, Card(name="d", x=IMAGE, y=CLASSES, splits={}))
    assert again.as_dict() == first


@pytest.mark.parametrize(
    ("x", "scale", "expected"), [(IMAGE, "auto", "range"), (VECTOR, "auto", "standard"), (VECTOR, "none", "none")]
)
def test_scaling(x, scale, expected):
    assert (
        resolved({"decoder": {"name": "mlp", "likelihood": "gaussian"}}, x=x, data={"path": "d", "scale": scale}).scale
        == expected
    )


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ({"regularizers": [{"name": "kl"}]}, {}, "a.yaml: kl needs a random posterior, but encoder builtins/mlp returns Point."),
        (
            {"decoder": {"name": "mlp", "likelihood": "bernoulli"}},
            {"x": VECTOR},
            "expects values in [0, 1], but data.scale = standard",
        ),
        ({"head": {"name": "softmax"}}, {"y": TARGETS}, "but the labels of d are of kind regression."),
        ({"head": {"name": "gaussian"}}, {"y": CLASSES}, "but the labels of d are of kind classes."),
        ({"encoder": {"name": "mlp", "posterior": "diagonal"}}, {}, 'a.yaml: model.encoder.posterior = "diagonal": expected'),
        ({"encoder": {"name": "mlp", "width": [3]}}, {}, "a.yaml: model.encoder.width: unknown key; allowed:"),
        ({"encoder": {"name": "mlp", "widths": [0]}}, {}, "a.yaml: model.encoder.widths.0 = 0: expected greater than"),
        ({"regularizers": [{"name": "dropout", "weight": 0.5}]}, {}, "weight and warmup_steps have no effect"),
        (
            {"decoder": {"name": "mlp", "likelihood": "bernoulli", "variance": "scalar"}},
            {},
            "only the gaussian likelihood has a variance",
        ),
    ],
)
def test_complaints(model, given, message):
    (line,) = complaints(model, **given)
    assert message in line


def test_every_complaint_is_made_at_once():
    model = {"regularizers": [{"name": "kl"}], "decoder": {"name": "mlp", "likelihood": "bernoulli"}}
    assert len(complaints(model, x=VECTOR, y=TARGETS)) == 3


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("encoder", {"encoder": {"name": "mlpp"}}),
        ("decoder", {"decoder": {"name": "mlpp"}}),
        ("head", {"head": {"name": "mlpp"}}),
    ],
)
def test_unknown_components(kind, model):
    with pytest.raises(
        PluginError, match=rf"a.yaml: model.{kind}.name = 'mlpp': there is no {kind} of this name.*Did you mean mlp\?"
    ):
        resolved(model)


def test_data_without_labels_takes_any_head():
    assert resolved(y=None).shapes.classes is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrain": {"ema": 0.99}}, "a.yaml: pretrain.ema = 0.99: the average is not kept in shards (parallel: fsdp)."),
        ({"finetune": {"ema": 0.9}}, "a.yaml: finetune.ema = 0.9: the average is not kept in shards (parallel: fsdp)."),
        (
            {"pretrain": {"optimizer": {"name": "sgd"}}},
            "a.yaml: pretrain.optimizer.name = sgd: torch's fused kernel of it takes no",
        ),
        ({"compile": True}, "a.yaml: compile = true: does not go with parallel: fsdp. Set compile: false, or set parallel: ddp."),
        (
            {"model": {"decoder": {"name": "linear"}, "regularizers": [{"name": "unit_norm"}]}},
            "a.yaml: model.regularizers.0 (builtins/unit_norm): changes whole weights after a step",
        ),
    ],
)
def test_what_does_not_go_with_shards_is_refused(given, message):
    found = complaints(**given, parallel="fsdp")
    assert any(line.startswith(message) and line.endswith("parallel: ddp.") for line in found), found
    resolved(**given, parallel="ddp")
