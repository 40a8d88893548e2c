"""Whatever is in a file, the answer is right or an SslAeError: never a traceback, never a hang."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from faults.shard_kit import npy, packed, picture, pictures, png, read_all, values, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_ae import recipe as recipes
from ssl_ae.data.card import Card, X, Y
from ssl_ae.data.damage import Tolerance
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.labels import LabelTable
from ssl_ae.data.pack import pack
from ssl_ae.data.shards import ShardReader
from ssl_ae.data.sources import PackOptions
from ssl_ae.data.sources.npz import Npz
from ssl_ae.errors import DataError, RecipeError, SslAeError
from ssl_ae.registry import Registry
from ssl_ae.resolve import resolve

SLOWEST_MS = 5_000  # of one example: what takes longer hangs


def few_and_many(few: int, many: int):
    """The same property with few examples in every run of the tests, and with many in `make test-faults`."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"])


def holds(examples: int, prop: Callable[..., None], **strategies: st.SearchStrategy) -> None:
    options = settings(max_examples=examples, deadline=SLOWEST_MS, database=None, suppress_health_check=list(HealthCheck))
    options(given(**strategies)(prop))()


# --- the bytes of a shard

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "remove", "repeat", "zero", "insert", "header"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 2_000),
        st.binary(min_size=1, max_size=24),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, float, int, bytes]]) -> bytes:
    out = bytearray(content)
    for kind, share, length, new in edits:
        at = int(share * len(out))
        if not out:
            break
        if kind == "flip":
            out[at] ^= 1 << (length % 8)
        elif kind == "set":
            out[at : at + len(new)] = new
        elif kind == "cut":
            del out[at:]
        elif kind == "remove":
            del out[at : at + length]
        elif kind == "repeat":
            out[at:at] = out[at : at + length]
        elif kind == "zero":
            out[at : at + length] = bytes(len(out[at : at + length]))
        elif kind == "insert":
            out[at:at] = new
        else:  # another header, with its checksum made right: what lies behind the checksum is tried, too
            start = at // 512 * 512
            if start + 512 <= len(out):
                place = start + length % 345
                out[place : place + len(new)] = new[: start + 500 - place]
                out[start + 148 : start + 156] = b" " * 8
                out[start + 148 : start + 156] = b"%06o\0 " % sum(out[start : start + 512])
    return bytes(out)


def blocks_of(folder: Path) -> bytes:
    return (packed(folder) / "train-000000.tar").read_bytes()


def pictures_of(folder: Path) -> bytes:
    return write_tar(folder / "x.tar", pictures(range(4))).read_bytes()


def arrays_of(folder: Path) -> bytes:
    members = {f"{row}.npy": npy(values(4)[row]) for row in range(4)} | {
        f"{row}.json": b'{"label": [0.5, 1]}' for row in range(4)
    }
    return write_tar(folder / "x.tar", members).read_bytes()


@few_and_many(40, 1_000)
@pytest.mark.parametrize("make", [blocks_of, pictures_of, arrays_of])
def test_the_bytes_of_a_shard(tmp_path, make, examples):
    sound, path = make(tmp_path), tmp_path / "train.tar"

    def prop(edits):
        path.write_bytes(edited(sound, edits))
        with contextlib.suppress(DataError):
            reader = ShardReader(path)
            keys, labels, x = reader.keys(), reader.labels(), reader.read(np.arange(reader.rows))
            assert len(keys) == len(labels) == len(x) == reader.rows
        with contextlib.suppress(DataError):
            reader = ShardReader(path, tolerant=True)
            good = np.delete(np.arange(reader.rows), [*reader.damage()])
            assert len(reader.read(good)) == len(reader.labels(good.tolist())) == len(good)

    holds(examples, prop, edits=EDITS)


@few_and_many(25, 1_000)
def test_a_shard_of_a_card_is_what_it_was_or_is_refused(tmp_path, examples):
    before = read_all(DataSet.open(packed(tmp_path)))
    path = tmp_path / "train-000001.tar"
    sound = path.read_bytes()

    def prop(edits):
        path.write_bytes(edited(sound, edits))
        with contextlib.suppress(DataError):
            DataSet.open(tmp_path, verify="all")
            assert path.read_bytes() == sound
        data = DataSet.open(tmp_path, tolerance=Tolerance(skip=True, limit=0.5))
        keys, x = read_all(data)["train"]
        rows = [before["train"][0].index(key) for key in keys]
        np.testing.assert_array_equal(x, before["train"][1][rows])
        assert len(rows) in (27, 41)

    holds(examples, prop, edits=EDITS)


@few_and_many(25, 1_000)
def test_the_bytes_of_a_picture(tmp_path, examples):
    """A PNG has checksums: it is read as it was or not at all."""
    path, sound = tmp_path / "train.tar", png(picture(1))

    def prop(edits):
        write_tar(path, {"0.png": png(picture(0)), "1.png": edited(sound, edits)})
        with contextlib.suppress(DataError):
            np.testing.assert_array_equal(ShardReader(path).read(np.array([1]))[0, 0], picture(1))

    holds(examples, prop, edits=EDITS)


@few_and_many(25, 1_000)
def test_the_bytes_of_an_npz(tmp_path, examples):
    path = tmp_path / "x.npz"
    np.savez(path, x=values(20), y=np.arange(20) % 3)
    sound = path.read_bytes()

    def prop(edits):
        path.write_bytes(edited(sound, edits))
        with contextlib.suppress(SslAeError):
            pack(str(path), tmp_path / "out", PackOptions(), [Npz], overwrite=True)

    holds(examples, prop, edits=EDITS)


# --- cards and recipes

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["mlp", "kl", "all", "../x", "train", "float32", "joint", "", "h*", "builtins/mlp", 0, 1, -1, 1e308])
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["value", "remove", "add", "rename"]), st.text(max_size=6), TREES),
    max_size=4,
)

RECIPE = {
    "name": "tiny",
    "seed": 3,
    "data": {"path": "digits", "labels": {"per_class": 3}, "damaged": "skip", "scale": "auto"},
    "model": {
        "latent_dim": 5,
        "samples": 1,
        "encoder": {"name": "mlp", "widths": [17], "posterior": "diag"},
        "decoder": {"name": "mlp", "likelihood": "gaussian"},
        "regularizers": [{"name": "kl", "weight": 0.5}, {"name": "dropout", "layers": ["h*"]}],
        "head": {"name": "softmax"},
    },
    "pretrain": {"epochs": 2, "batch_size": 128, "optimizer": {"name": "adamw", "lr": 0.001}, "schedule": {"name": "cosine"}},
    "finetune": {"epochs": 2, "mode": "joint", "alpha": 0.01},
    "stages": ["pretrain", {"stage": "finetune", "set": {"finetune.mode": "joint"}}],
    "device": "cpu",
}


def changed(tree: object, changes: list) -> object:
    """A copy with some of its nodes replaced, removed, renamed or joined by others."""
    tree = json.loads(json.dumps(tree))
    for which, how, name, value in changes:
        places = [*_places(tree)]
        if not places:
            break
        holder, key = places[which % len(places)]
        if how == "value":
            holder[key] = value
        elif how == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[name] = value if how == "add" else holder.pop(key)
        else:
            holder.append(value)
    return tree


def _places(node: object):
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in list(pairs):
        yield node, key
        yield from _places(inner)


VECTORS = Card(
    name="toy",
    x=X(kind="vector", dtype="float32", shape=(7,), range=(-1, 1), mean=(0.0,) * 7, std=(1.0,) * 7),
    y=Y(task="classes", names=("a", "b")),
    splits={},
)


@few_and_many(60, 1_000)
def test_recipe_trees(tmp_path, examples):
    registry, path = Registry.discover(), tmp_path / "r.yaml"

    def prop(changes):
        path.write_text(yaml.safe_dump(changed(RECIPE, changes), allow_unicode=True), encoding="utf-8")
        with contextlib.suppress(SslAeError):
            recipe = recipes.load(path)
            resolved = resolve(recipe, registry, VECTORS, str(path)).as_dict()
            assert recipes.parse(resolved).model_dump() == recipes.parse(json.loads(json.dumps(resolved))).model_dump()

    holds(examples, prop, changes=CHANGES)


@few_and_many(40, 1_000)
def test_texts_that_may_be_recipes(tmp_path, examples):
    path = tmp_path / "r.yaml"
    sound = yaml.safe_dump(RECIPE).encode()

    def prop(edits, override):
        path.write_bytes(edited(sound, edits))
        with contextlib.suppress(RecipeError):
            recipes.load(path, [override])

    words = st.sampled_from(
        ["seed", "data.path", "model.encoder.widths", "stages.0", "stages.9.set", "model.regularizers.0.weight", "name"]
    )
    overrides = st.text(max_size=30) | st.tuples(words, st.text(max_size=20)).map("=".join)
    holds(examples, prop, edits=EDITS, override=overrides)


@few_and_many(40, 1_000)
def test_cards(tmp_path, examples):
    packed(tmp_path)
    sound = json.loads((tmp_path / "card.json").read_text())

    def prop(changes, raw):
        text = raw if raw is not None else json.dumps(changed(sound, changes)).encode("utf-8", "surrogatepass")
        (tmp_path / "card.json").write_bytes(text)
        for tolerance in (Tolerance(), Tolerance(skip=True, limit=1)):
            with contextlib.suppress(SslAeError):
                for keys, x in read_all(DataSet.open(tmp_path, tolerance=tolerance)).values():
                    assert len(keys) == len(x)

    holds(examples, prop, changes=CHANGES, raw=st.none() | st.none() | st.binary(max_size=200))


# --- label tables

CELLS = st.text(max_size=8) | st.sampled_from(
    ["-1", "nan", "0", "1", "cat", "dog", "1e400", "0.5", "1 2", '"', "９", "-0", "1_0", "inf", "9" * 400]
)
MEANINGS = [
    None,
    Y(task="classes", names=("cat", "dog")),
    Y(task="regression", names=("a",)),
    Y(task="regression", names=("a", "b")),
    Y(task="multilabel", names=("a", "b")),
]


@few_and_many(60, 1_000)
def test_label_tables(tmp_path, examples):
    path = tmp_path / "labels.csv"

    def prop(head, rows, y, raw):
        text = "\n".join([head, *(",".join(row) for row in rows)]).encode("utf-8", "surrogatepass")
        path.write_bytes(text if raw is None else raw)
        with contextlib.suppress(DataError):
            table = LabelTable.read(path, y)
            assert len(table.keys) == len(table.labels) == len(set(table.keys.tolist()))
            assert table.y is not None
            if table.y.task == "classes":
                assert ((table.labels >= -1) & (table.labels < len(table.y.names))).all()
            else:
                assert table.labels.shape == (len(table.keys), len(table.y.names))
                assert not np.isinf(table.labels).any()

    holds(
        examples,
        prop,
        head=st.sampled_from(
            ["key,label", "key,label,weight", "key,label,probability", "label,key", "key", "key,label,label", ""]
        ),
        rows=st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=6),
        y=st.sampled_from(MEANINGS),
        raw=st.none() | st.none() | st.none() | st.binary(max_size=100),
    )


@few_and_many(25, 1_000)
def test_the_bytes_of_a_label_table(tmp_path, examples):
    path = tmp_path / "labels.parquet"
    LabelTable(np.array([f"k{row}" for row in range(50)], dtype=object), np.arange(50) % 2).write(path)
    sound = path.read_bytes()

    def prop(edits):
        path.write_bytes(edited(sound, edits))
        with contextlib.suppress(DataError):
            table = LabelTable.read(path, Y(task="classes", names=("cat", "dog")))
            assert len(table.keys) == len(table.labels)

    holds(examples, prop, edits=EDITS)
