"""Label tables: what users write, what a budget of labels may use, and every way to get it wrong."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_ae import tables
from ssl_ae.data.card import Y
from ssl_ae.data.labels import LabelTable, aligned, draw
from ssl_ae.errors import DataError

PETS = Y(task="classes", names=("cat", "dog", "rat"))
SCORE = Y(task="regression", names=("score",))
TAGS = Y(task="multilabel", names=("red", "round"))


def keys_of(*names):
    return np.array(names, dtype=object)


def csv(tmp_path, *lines):
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


# --- reading and writing


@pytest.mark.parametrize("labels", [np.array([2, -1, 0]), np.array([[0.5, np.nan], [1, 2], [3, 4]], np.float32)])
def test_a_table_comes_back_as_it_went(tmp_path, labels):
    path = tmp_path / "labels.parquet"
    weight, probability = np.array([1, 2, 0.5], np.float32), np.array([0.1, 0.9, 1], np.float32)
    LabelTable(keys_of("b", "a", "c"), labels, weight, probability).write(path)
    y = PETS if labels.ndim == 1 else Y(task="regression", names=("u", "v"))
    found = LabelTable.read(path, y)
    assert found.keys.tolist() == ["b", "a", "c"]
    assert found.labels.dtype == labels.dtype
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.weight, weight)
    np.testing.assert_array_equal(found.probability, probability)
    assert found.y == y


def test_other_tools_see_key_and_label_with_null_for_unknown(tmp_path):
    LabelTable(keys_of("a", "b"), np.array([1, -1])).write(tmp_path / "labels.parquet")
    table = tables.read_parquet(tmp_path / "labels.parquet")
    assert table.names == ("key", "label")
    assert table["label"].tolist() == [1, None]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["dog", "cat", "", " rat "], [1, 0, -1, 2]),
        (["2", "0", "-1", "NA"], [2, 0, -1, -1]),
    ],
)
def test_classes_by_name_or_by_index(tmp_path, cells, expected):
    path = csv(tmp_path, "key,label", *(f"k{row},{cell}" for row, cell in enumerate(cells)))
    assert LabelTable.read(path, PETS).labels.tolist() == expected


def test_classes_called_like_numbers_are_names_first(tmp_path):
    names = Y(task="classes", names=("1", "2", "3"))
    assert LabelTable.read(csv(tmp_path, "label,key", "1,a", "3,b"), names).labels.tolist() == [0, 2]
    # 0 is no name, so the whole column is indices
    assert LabelTable.read(csv(tmp_path, "label,key", "1,a", "0,b"), names).labels.tolist() == [1, 0]


def test_what_we_wrote_holds_indices_whatever_the_classes_are_called(tmp_path):
    path = tmp_path / "labels.parquet"
    LabelTable(keys_of("a", "b"), np.array([1, 2])).write(path)  # no row of class 0, so every value is a name too
    assert LabelTable.read(path, Y(task="classes", names=("1", "2", "3"))).labels.tolist() == [1, 2]
    with pytest.raises(DataError, match="label '2' is not a class"):
        LabelTable.read(path, Y(task="classes", names=("2", "1")))


@pytest.mark.parametrize("labels", [["dog", None, "rat"], np.ma.masked_array([1, 0, 2], [0, 1, 0]), [1.0, np.nan, 2.0]])
def test_a_users_parquet_may_hold_names_integers_or_whole_floats(tmp_path, labels):
    path = tmp_path / "mine.parquet"
    labels = np.array(labels) if isinstance(labels[0], float) else labels
    tables.write_parquet(path, {"key": np.array([7, 8, 9]), "label": labels})
    found = LabelTable.read(path, PETS)
    assert found.keys.tolist() == ["7", "8", "9"]
    assert found.labels.tolist() == [1, -1, 2]


def test_numbers_and_several_targets(tmp_path):
    found = LabelTable.read(csv(tmp_path, "key,label,weight", "a,0.5,1", "b,,2"), SCORE)
    np.testing.assert_array_equal(found.labels, np.array([[0.5], [np.nan]], np.float32))
    assert found.weight.tolist() == [1, 2]
    found = LabelTable.read(csv(tmp_path, "key,label", "a,1 0", "b,", "c,0 nan"), TAGS)
    np.testing.assert_array_equal(found.labels, np.array([[1, 0], [np.nan, np.nan], [0, np.nan]], np.float32))


@pytest.mark.parametrize(
    ("cells", "y", "labels"),
    [
        (["dog", "cat", "dog"], Y(task="classes", names=("cat", "dog")), [1, 0, 1]),
        (["10", "9", ""], Y(task="classes", names=("9", "10")), [1, 0, -1]),
        (["0.5", "2", "1"], Y(task="regression", names=("label",)), [[0.5], [2], [1]]),
    ],
)
def test_without_a_card_the_labels_say_what_they_mean(tmp_path, cells, y, labels):
    path = csv(tmp_path, "key,label", *(f"k{row},{cell}" for row, cell in enumerate(cells)))
    found = LabelTable.read(path)
    assert found.y == y
    assert found.labels.tolist() == labels


def test_repeated_rows_that_agree_count_once(tmp_path):
    found = LabelTable.read(csv(tmp_path, "key,label", "b,cat", "a,dog", "b,cat"), PETS)
    assert found.keys.tolist() == ["b", "a"]
    assert found.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("y", "lines", "complaint"),
    [
        (PETS, ["key,label", "a,cat", "b,dgo"], r"row 2: label 'dgo' is not a class.*cat, dog or rat.*Did you mean dog\?"),
        (PETS, ["key,label", "a,3"], "label '3' is not a class"),
        (PETS, ["key,label", "a,cat", "b,1"], "label '1' is not a class"),  # names and indices mixed
        (PETS, ["key,label", "a,cat", "b,cat", "a,dog"], "rows 1 and 3 disagree about the key 'a'"),
        (PETS, ["key,label", "a,cat", ",dog"], "row 2: the key is missing"),
        (PETS, ["key,class", "a,cat"], "no column 'label'"),
        (PETS, ["key,label,wieght", "a,cat,1"], r"column 'wieght' is not one of.*Did you mean weight\?"),
        (PETS, ["key,label,weight", "a,cat,-1"], r"row 1: weight = -1: expected a number of at least 0"),
        (PETS, ["key,label,weight", "a,cat,"], "row 1: weight = nan"),
        (PETS, ["key,label,probability", "a,cat,1.5"], r"probability = 1\.5: expected a number in \[0, 1\]"),
        (SCORE, ["key,label", "a,0.5", "b,high"], "row 2: label = 'high': expected a number"),
        (SCORE, ["key,label", "a,inf"], "expected a finite number"),
        (TAGS, ["key,label", "a,1 0 1"], "row 1: the label is 3 numbers: expected 2, for red and round"),
        (TAGS, ["key,label", "a,1 0.5"], r"row 1: label 'round' = 0\.5: expected 0 or 1"),
        (None, ["key,label", "a,"], "no row has a label"),
        (PETS, [""], "labels.csv"),
    ],
)
def test_a_bad_table_is_explained(tmp_path, y, lines, complaint):
    with pytest.raises(DataError, match=complaint):
        LabelTable.read(csv(tmp_path, *lines), y)


def test_only_csv_and_parquet_are_label_tables(tmp_path):
    with pytest.raises(DataError, match=r"a label table is a \.csv or a \.parquet"):
        LabelTable.read(tmp_path / "labels.xlsx", PETS)


def test_keys_that_do_not_exist_are_counted_and_named():
    table = LabelTable(keys_of("a", "ghost-2", "ghost-1"), np.array([0, 1, 1]))
    table.check_keys(["a", "ghost-1", "ghost-2", "b"], "mine.csv")
    with pytest.raises(DataError, match=r"mine\.csv: 2 of 3 keys are not in the data set, for example 'ghost-1' and 'ghost-2'"):
        table.check_keys(["a", "b"], "mine.csv")


def test_labels_are_laid_beside_keys():
    table = LabelTable(keys_of("c", "a"), np.array([2, 0]))
    assert aligned(table, ["a", "b", "c", "d"]).tolist() == [0, -1, 2, -1]
    table = LabelTable(keys_of("c", "a"), np.array([[2, 3], [0, 1]], np.float32))
    np.testing.assert_array_equal(aligned(table, ["a", "b", "c"]), [[0, 1], [np.nan, np.nan], [2, 3]])
    assert aligned(table, []).shape == (0, 2)


# --- budgets

ROWS = 211
KEYS = [f"train-{row:08d}" for row in range(ROWS)]
LABELS = np.arange(ROWS) % 5 - 1  # 43 unlabelled, 42 of each of four classes
NAMES = ("a", "b", "c", "d")


def test_the_first_of_each_class_by_hash_are_drawn():
    chosen = draw(LABELS, KEYS, names=NAMES, seed=3, per_class=2)
    for index in range(4):  # the definition, written again
        ranked = sorted(np.flatnonzero(index == LABELS), key=lambda row: hashlib.sha256(f"3:{KEYS[row]}".encode()).digest())
        assert sorted(ranked[:2]) == np.flatnonzero(chosen & (index == LABELS)).tolist()


@given(st.integers(1, 160), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_total_is_exact_balanced_and_nested(total, seed):
    chosen = draw(LABELS, KEYS, names=NAMES, seed=seed, total=total)
    assert chosen.sum() == total
    assert not chosen[LABELS < 0].any()
    counts = np.bincount(LABELS[chosen], minlength=4)
    assert counts.max() - counts.min() <= 1
    more = draw(LABELS, KEYS, names=NAMES, seed=seed, total=total + 7)
    assert (more[chosen]).all()


def test_a_draw_depends_on_the_keys_and_not_on_their_order():
    shuffled = np.random.default_rng(0).permutation(ROWS)
    chosen = draw(LABELS, KEYS, names=NAMES, seed=0, total=10)
    again = draw(LABELS[shuffled], [KEYS[row] for row in shuffled], names=NAMES, seed=0, total=10)
    np.testing.assert_array_equal(again, chosen[shuffled])
    assert (draw(LABELS, KEYS, names=NAMES, seed=1, total=10) != chosen).any()


def test_which_class_gets_what_does_not_divide_is_the_seeds():
    favoured = {int(LABELS[draw(LABELS, KEYS, names=NAMES, seed=seed, total=1)][0]) for seed in range(20)}
    assert favoured == {0, 1, 2, 3}


def test_numbers_are_drawn_in_total():
    labels = np.where(LABELS < 0, np.nan, 1.0).astype(np.float32)[:, None]
    chosen = draw(labels, KEYS, names=("score",), seed=0, total=17)
    assert chosen.sum() == 17
    assert not chosen[LABELS < 0].any()
    with pytest.raises(DataError, match="per_class needs classes"):
        draw(labels, KEYS, names=("score",), seed=0, per_class=1)


@pytest.mark.parametrize(
    ("budget", "complaint"),
    [
        ({"total": 0}, "total = 0: expected at least 1"),
        ({"per_class": -3}, "per_class = -3: expected at least 1"),
        ({"per_class": 43}, "class 'a' has 42 labels in the train split, but 43 are asked"),
        ({"total": 169}, "has 42 labels in the train split, but 43 are asked"),
    ],
)
def test_a_budget_that_cannot_be_met_is_explained(budget, complaint):
    with pytest.raises(DataError, match=complaint):
        draw(LABELS, KEYS, names=NAMES, seed=0, **budget)
