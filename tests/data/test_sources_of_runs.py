"""The latents of a run as a data set: codes, keys, labels and splits come back as they were extracted."""

import numpy as np
import pytest
from source_kit import everything, opened

from ssl_ae import latents
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.pack import pack
from ssl_ae.data.sources import PackOptions
from ssl_ae.data.sources.latents import StoredLatents
from ssl_ae.errors import DataError

K, ROWS = 5, {"train": 23, "val": 7, "test": 11}
FACTS = {"weights_sha256": "0" * 64}


def stored(folder, label, task="classes", rows=ROWS, **change):
    """RUN/latents as `extract` leaves it; label(split rows, generator) -> their label column."""
    random, tables = np.random.default_rng(0), {}
    for split, count in rows.items():
        place = folder / "latents" / split
        place.mkdir(parents=True)
        z = random.normal(size=(count, K)).astype(np.float32)
        keys = np.array([f"{split}-{row:08d}" for row in range(count)], dtype=object)
        columns = {"key": keys, "label": label(count, random), "latent": z, "latent_std": np.ones_like(z), **change}
        latents.write_part(latents.part_of(place, 0), columns, FACTS)
        latents.finish(place, count, FACTS, task)
        tables[split] = columns
    return folder / "latents", tables


def test_codes_keys_labels_and_splits_are_kept(tmp_path):
    place, tables = stored(tmp_path / "run", lambda n, random: np.arange(n) % 3 - 1)
    (place / "_map.png").write_bytes(b"")  # the map of the latents, as `extract` draws it: no image of a data set
    source = opened(StoredLatents, place)
    found = source.describe()
    assert (found.name, found.task, found.names, found.splits) == ("run-latents", "classes", ("0", "1"), ("train", "val", "test"))
    for split, columns in tables.items():
        keys, x, labels = everything(source, split)
        assert keys == list(columns["key"])
        assert np.array_equal(x, columns["latent"])  # and not the deviations beside it
        assert np.array_equal(labels, columns["label"])


def test_packed_they_are_a_data_set_of_vectors(tmp_path):
    """What was validation for the first model is validation for the second."""
    place, tables = stored(tmp_path / "run", lambda n, random: np.arange(n) % 3)
    card = pack(str(place), tmp_path / "packed", PackOptions(), [StoredLatents], lambda rows: None, False)
    assert (card.x.kind, card.x.shape, {name: split.rows for name, split in card.splits.items()}) == ("vector", (K,), ROWS)
    data = DataSet.open(str(tmp_path / "packed"))
    order = {key: row for row, key in enumerate(tables["val"]["key"])}
    rows = [order[key] for key in data.split("val").keys]
    assert np.array_equal(data.split("val").read(np.arange(7)), tables["val"]["latent"][rows])
    assert np.array_equal(data.labels("val"), tables["val"]["label"][rows])


def test_train_rows_may_be_drawn(tmp_path):
    """N(latent, latent_std^2), another draw for another seed; the other splits keep their means."""
    std = np.full((23, K), 0.5, dtype=np.float32) * (np.arange(K) < 3)
    place, tables = stored(tmp_path / "run", lambda n, random: np.arange(n) % 3, rows={"train": 23}, latent_std=std)
    means = tables["train"]["latent"]
    draws = np.stack([everything(opened(StoredLatents, place, draw=seed))[1] - means for seed in range(100)])
    assert np.array_equal(everything(opened(StoredLatents, place, draw=7))[1] - means, draws[7])
    assert not draws[..., 3:].any()
    assert abs(draws[..., :3].mean()) < 4 * 0.5 / 6900**0.5  # 6,900 numbers
    assert abs(draws[..., :3].std() - 0.5) < 4 * 0.5 / (2 * 6900) ** 0.5


def test_rows_to_be_judged_by_are_not_drawn(tmp_path):
    place, tables = stored(tmp_path / "run", lambda n, random: np.arange(n) % 3)
    source = opened(StoredLatents, place, draw=0)
    same = {split: np.array_equal(everything(source, split)[1], columns["latent"]) for split, columns in tables.items()}
    assert same == {"train": False, "val": True, "test": True}


def test_certain_codes_cannot_be_drawn(tmp_path):
    place, tables = stored(tmp_path / "run", lambda n, random: np.arange(n) % 3)
    part = latents.part_of(place / "train", 0)
    columns = {name: column for name, column in tables["train"].items() if name != "latent_std"}
    latents.write_part(part, columns, FACTS)
    latents.finish(place / "train", 23, FACTS, "classes")
    with pytest.raises(DataError, match="codes of its encoder are certain"):
        opened(StoredLatents, place, draw=0)


def test_targets_of_a_regression(tmp_path):
    place, tables = stored(tmp_path / "run", lambda n, random: random.normal(size=(n, 2)).astype(np.float32), task="regression")
    source = opened(StoredLatents, place)
    assert source.describe().names == ("target1", "target2")
    assert np.array_equal(everything(source)[2], tables["train"]["label"])


@pytest.mark.parametrize("task", ["classes", None])
def test_without_labels(tmp_path, task):
    place, _ = stored(tmp_path / "run", lambda n, random: np.full(n, -1), task=task)
    source = opened(StoredLatents, place)
    assert source.describe().task is None
    assert everything(source)[2] is None


def test_unfinished_latents_are_no_source(tmp_path):
    place, _ = stored(tmp_path / "run", lambda n, random: np.arange(n) % 3)
    (place / "train" / latents.MANIFEST).unlink()
    assert not StoredLatents.recognises(str(place))


def test_a_code_that_is_not_finite(tmp_path):
    z = np.zeros((23, K), dtype=np.float32)
    z[17, 3] = np.nan
    place, _ = stored(tmp_path / "run", lambda n, random: np.arange(n) % 3, rows={"train": 23}, latent=z)
    with pytest.raises(DataError, match=r"part-00000\.parquet: row 18 has a latent that is not finite\. Extract again\."):
        everything(opened(StoredLatents, place))


def test_an_option_of_tables_is_refused(tmp_path):
    place, _ = stored(tmp_path / "run", lambda n, random: np.arange(n) % 3)
    with pytest.raises(DataError, match="--label means nothing"):
        opened(StoredLatents, place, label="label")
