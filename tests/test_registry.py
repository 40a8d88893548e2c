"""Discovery and names: every way in which a plugin can be wrong, and what it costs the others."""

import sys

import pytest
from plugin_kit import encoder, put

import ssl_ae
from ssl_ae.errors import PluginError
from ssl_ae.recipe import parse
from ssl_ae.registry import Registry
from ssl_ae.resolve import resolve
from ssl_ae.testing.world import plugin_of


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(distribution, source, entry_point=...): see plugin_kit.put."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = []
    yield lambda *words, **more: modules.append(put(tmp_path, *words, **more))
    for module in modules:
        sys.modules.pop(module, None)


def test_an_installed_plugin_is_found_by_short_and_full_name(install):
    install("zinc", encoder("zinc"))
    registry = Registry.discover()
    assert registry.plugins["zinc"].status == "loaded"
    assert registry.plugins["zinc"].origin == "zinc 1.2"
    short, full = registry.find("encoder", "zinc"), registry.find("encoder", "zinc/zinc")
    assert short is full
    assert (short.full_name, short.summary) == ("zinc/zinc", "Codes of zinc.")


def test_builtins_come_through_their_entry_point():
    registry = Registry.discover()
    assert registry.find("encoder", "mlp").full_name == "builtins/mlp"
    assert registry.plugins["builtins"].distribution == "ssl-ae"


def test_an_ambiguous_short_name_lists_the_owners(install):
    install("tin", encoder("mlp"))
    registry = Registry.discover()
    with pytest.raises(PluginError) as error:
        registry.find("encoder", "mlp", "a.yaml: model.encoder.name")
    assert str(error.value) == (
        "a.yaml: model.encoder.name = 'mlp': encoder 'mlp' is ambiguous: "
        f"builtins/mlp (ssl-ae {ssl_ae.__version__}) and tin/mlp (tin 1.2). Write the full name."
    )
    assert registry.find("encoder", "tin/mlp").plugin.name == "tin"
    assert registry.find("decoder", "mlp").full_name == "builtins/mlp"  # the name is ambiguous among encoders alone


def test_two_distributions_with_one_entry_point_name(install):
    install("lead", encoder("lead"), entry_point="metal")
    install("iron", encoder("iron"), entry_point="metal")
    with pytest.raises(PluginError, match="two distributions register the plugin name 'metal'") as error:
        Registry.discover()
    assert "lead 1.2" in str(error.value)
    assert "iron 1.2" in str(error.value)


BROKEN = {
    "does not import": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    "misspelt hook": (encoder("gold").replace("def ssl_ae_encoders", "def ssl_ae_encoder"), "unknown hook 'ssl_ae_encoder'"),
    "hook with an argument": (encoder("gold").replace("ssl_ae_encoders()", "ssl_ae_encoders(model)"), "model"),
    "hook without its mark": (encoder("gold").replace("@ssl_ae.hookimpl", ""), "it offers no component"),
    "class of another kind": (encoder("gold").replace("PlainEncoder", "PlainHead"), "which is no subclass of ssl_ae.Encoder"),
    "no class": (encoder("gold").replace("[Gold]", "[Gold.name]"), "ssl_ae_encoders returned 'gold'"),
    "two classes of one name": (
        encoder("gold").replace("[Gold]", "[Gold, type('Other', (Gold,), {})]"),
        "two classes named 'gold'",
    ),
    "illegal name": (encoder("gold").replace('"gold"', '"Gold/leaf"'), "name = 'Gold/leaf': expected lower-case letters"),
    "no name": (encoder("gold").replace("name =", "name = None; title ="), "name = None"),
    "not a Config": (encoder("gold").replace('"gold"', '"gold"; Config = dict'), "Config must be a subclass of ssl_ae.Config"),
    "hook fails": (encoder("gold").replace("return [Gold]", "return 1 / 0"), "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_listed_and_raises_only_when_used(install, case):
    source, reason = BROKEN[case]
    install("gold", source)
    install("zinc", encoder("zinc"))
    registry = Registry.discover()
    plugin = registry.plugins["gold"]
    assert plugin.status == "broken"
    assert reason in plugin.reason
    assert registry.find("encoder", "mlp").full_name == "builtins/mlp"
    assert registry.find("encoder", "zinc").full_name == "zinc/zinc"
    with pytest.raises(PluginError, match=r"plugin 'gold' \(gold 1\.2\) is broken: "):
        registry.find("encoder", "gold/gold")
    with pytest.raises(PluginError, match=r"there is no encoder of this name.* Broken plugins, one of which may hold it: gold"):
        registry.find("encoder", "gold")


@pytest.mark.parametrize("base", ["Encoder", "Decoder", "Regularizer", "Head", "TableHead"])
def test_a_component_may_not_declare_what_the_engine_reads(base):
    names = ("name", "weight", "warmup_steps", "layers") if base == "Regularizer" else ("name",)
    for name in names:
        options = type("Config", (ssl_ae.Config,), {"__annotations__": {name: int}, name: 1})
        with pytest.raises(PluginError, match=rf"Mine\.Config declares {name}, which the engine reads itself"):
            type("Mine", (getattr(ssl_ae, base),), {"__qualname__": "Mine", "name": "mine", "Config": options})


def test_the_allow_list_disables_the_others(install, monkeypatch):
    install("zinc", encoder("zinc"))
    install("gold", "raise RuntimeError('imported although it is not allowed')")
    monkeypatch.setenv("SSL_AE_PLUGINS", "builtins, zinc")
    registry = Registry.discover()
    assert {name: plugin.status for name, plugin in registry.plugins.items() if name in ("builtins", "zinc", "gold")} == {
        "builtins": "loaded",
        "zinc": "loaded",
        "gold": "disabled",
    }
    with pytest.raises(PluginError, match=r"plugin 'gold' \(gold 1\.2\) is disabled: not named in SSL_AE_PLUGINS\."):
        registry.find("encoder", "gold/gold")


def test_the_allow_list_with_an_unknown_name(monkeypatch):
    monkeypatch.setenv("SSL_AE_PLUGINS", "builtin")
    with pytest.raises(PluginError, match=r"SSL_AE_PLUGINS names 'builtin', which is not installed.* Did you mean builtins\?"):
        Registry.discover()


def test_an_unknown_name_gets_the_nearest_match():
    with pytest.raises(PluginError) as error:
        Registry.discover().find("regularizer", "gausian_noise", "a.yaml: model.regularizers.0.name")
    assert str(error.value).startswith(
        "a.yaml: model.regularizers.0.name = 'gausian_noise': there is no regularizer of this name"
    )
    assert str(error.value).endswith("Did you mean gaussian_noise?")


def test_a_full_name_gets_the_nearest_full_name():
    with pytest.raises(PluginError, match=r"Did you mean builtins/mlp\?"):
        Registry.discover().find("encoder", "builtin/mlp")


def test_a_module_is_added_by_hand_or_refused_whole():
    class Good(ssl_ae.Encoder):
        """An encoder."""

        name = "good"

    class Bad(ssl_ae.Encoder):
        name = ""

    registry = Registry()
    registry.add("mine", plugin_of([Good]))
    with pytest.raises(PluginError, match=r"plugin 'other' \(\(local\)\): .*name = ''"):
        registry.add("other", plugin_of([Good, Bad]))
    with pytest.raises(PluginError, match="two distributions register the plugin name 'mine'"):
        registry.add("mine", plugin_of([Good]))
    assert [entry.full_name for entry in registry.entries] == ["mine/good"]


def test_a_recipe_meets_an_ambiguous_a_broken_and_an_unknown_component(install):
    from ssl_ae.data.card import Card, Split, X

    install("tin", encoder("mlp"))
    install("gold", "raise RuntimeError('no licence')")
    card = Card(
        name="d", x=X(kind="vector", dtype="float32", shape=(11,), range=(0, 1)), splits={"train": Split(rows=1, shards=())}
    )

    def resolved(name):
        recipe = parse({"name": "r", "data": {"path": "d"}, "model": {"encoder": {"name": name}}})
        return resolve(recipe, Registry.discover(), card, "a.yaml")

    assert resolved("builtins/mlp").encoder.full_name == "builtins/mlp"
    with pytest.raises(PluginError, match=r"a\.yaml: model\.encoder\.name = 'mlp': .*ambiguous"):
        resolved("mlp")
    with pytest.raises(PluginError, match=r"a\.yaml: .*gold.* is broken: RuntimeError: no licence"):
        resolved("gold/gold")
    with pytest.raises(PluginError, match=r"Did you mean conv\?"):
        resolved("convv")
