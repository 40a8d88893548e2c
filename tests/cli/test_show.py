"""plugins show: what a component is, what it tells the engine, and options that can be copied into a recipe."""

import re

import pytest
from command_line import call

from ssl_ae.registry import Registry


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("kl", "verbs penalty; over rows; needs label_sum"),
        ("weights", "verbs penalty; over model"),
        ("sparse_kl", "verbs penalty; over step; needs step_mean"),
        ("contractive", "verbs penalty; over rows; needs clean"),
        ("grayscale", "verbs perturb; always; of samples"),
        ("unit_norm", "verbs project"),
        ("sparse_coding", "not differentiable; reads decoder"),
        ("knn", "tasks classes; fitted at once; fits on cpu"),
        ("linear", None),
    ],
)
def test_show_tells_what_a_class_declares_to_the_engine(name, line):
    told = [text for text in call("plugins", "show", name).stdout.splitlines() if text.startswith("  declares: ")]
    assert told == ([] if line is None else [f"  declares: {line}"])


def test_show_writes_defaults_as_recipes_do():
    """true, null and lists, ready to be copied; long lists of choices in lines that fit a screen."""
    text = call("plugins", "show", "builtins/mlp").stdout
    assert "  batch_norm: bool or null; default null" in text.splitlines()
    assert "  batch_norm: bool; default false" in text.splitlines()
    assert "  class: ssl_ae_builtins.mlp.MlpEncoder" in text.splitlines()
    assert max(map(len, text.splitlines())) <= 130


def test_every_technique_says_its_source():
    """Name and year of a paper, or a standard, in what `plugins show` prints of it."""
    registry = Registry.discover()
    without = [
        entry.full_name
        for entry in registry.entries
        if entry.plugin.name == "builtins"
        and entry.kind != "source"
        and not re.search(r"\b(1[89]|20)\d\d\b|ITU-R", entry.cls.__doc__.splitlines()[0])
    ]
    assert without == []


def test_every_option_says_its_effect_and_numbers_say_their_range():
    """A number without limits must be one that has none: it is named here."""
    free = {"salt_pepper.low", "salt_pepper.high"}
    components = call("plugins", "list", "--json").json["components"]
    for name in {component["full_name"] for component in components if component["full_name"].startswith("builtins/")}:
        for found in call("plugins", "show", name, "--json").json["components"]:
            for option in found["options"]:
                place = f"{found['name']}.{option['name']}"
                assert len(option["description"].split()) >= 2, place
                if option["type"].split()[0] in ("int", "float"):
                    assert option["range"] or re.search("[<>]", option["type"]) or place in free, place
