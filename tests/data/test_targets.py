"""What a label column means. Every expectation is by hand."""

import numpy as np
import pytest

from ssl_ae.data.sources.targets import targets_of
from ssl_ae.errors import DataError


def text(*cells):
    return np.array(cells, dtype=object)


def read(column, task=None):
    return targets_of({"y": column}, task, "place")


def test_whole_numbers_are_classes_in_the_order_of_their_values():
    found = read(np.array([10, 2, 7, 2]))
    assert found.task == "classes"
    assert found.names == ("2", "7", "10")
    assert found.values.tolist() == [2, 0, 1, 0]
    assert found.values.dtype == np.int64


def test_text_is_classes_in_the_order_of_its_letters_and_an_empty_cell_is_unlabelled():
    found = read(text("dog", "", "cat", None, "dog", "NaN", " dog "))
    assert found.names == ("cat", "dog")
    assert found.values.tolist() == [1, -1, 0, -1, 1, -1, 1]


@pytest.mark.parametrize(
    "column",
    [np.array([3.0, np.nan, -1.0, 5.0]), text("3", "", "-1", "5"), text("3.0", "nan", "-1", "5.0")],
    ids=["floats", "text of integers", "text of floats"],
)
def test_minus_one_and_nan_stand_for_no_label(column):
    found = read(column)
    assert found.names == ("3", "5")
    assert found.values.tolist() == [0, -1, -1, 1]


def test_fractions_are_a_regression():
    found = read(text("1.5", "", "2", "-1"))
    assert (found.task, found.names) == ("regression", ("y",))
    np.testing.assert_array_equal(found.values, np.array([[1.5], [np.nan], [2], [-1]], dtype=np.float32))


def test_the_task_given_rules_over_the_one_that_the_values_suggest():
    assert read(np.array([1, 2, 3]), "regression").values.tolist() == [[1], [2], [3]]
    assert read(np.array([0, 1, 1]), "multilabel").values.tolist() == [[0], [1], [1]]
    assert read(np.arange(300), "classes").values.tolist() == list(range(300))


def test_several_columns_are_targets_and_zeros_and_ones_are_multilabel():
    answers = {"sun": np.array([0.0, 1, 1]), "rain": np.array([1.0, 1, np.nan])}
    amounts = {"sun": np.array([0.0, 1, 1]), "rain": np.array([2.0, 1, 3])}
    assert targets_of(answers, None, "place").task == "multilabel"
    found = targets_of(amounts, None, "place")
    assert (found.task, found.names) == ("regression", ("sun", "rain"))
    assert found.values.shape == (3, 2)


@pytest.mark.parametrize("column", [text("", None), np.array([np.nan]), np.array([-1, -1])])
def test_nothing_known_is_no_task(column):
    found = read(column)
    assert (found.task, found.names, found.values) == (None, (), None)


@pytest.mark.parametrize(
    ("columns", "task", "message"),
    [
        ({"y": np.array([-1, 1, 1])}, None, "only -1 and 1.*0 and 1"),
        ({"y": np.arange(101)}, None, "101 different values in 101 rows.*--task classes.*--task regression"),
        ({"y": text(*(f"id{row}" for row in range(101)))}, None, "101 different values"),
        ({"y": np.array([0.5, 1])}, "classes", "fractions such as 0.5.*--task regression"),
        ({"y": np.array([0.0, 2])}, "multilabel", "only 0 and 1, but here is 2"),
        ({"y": text("1", "wet")}, "regression", "label column 'y' holds the text 'wet'"),
        ({"y": np.array([1.0, np.inf])}, "regression", "infinity"),
        ({"a": np.array([1, 0]), "b": np.array([0, 1])}, None, "exactly one 1.*--task multilabel"),
        ({"a": np.array([1, 0]), "b": np.array([0, 1])}, "classes", "one label column, not 2"),
    ],
)
def test_values_that_cannot_be_of_the_task_or_leave_it_open(columns, task, message):
    with pytest.raises(DataError, match=f"place.*{message}"):
        targets_of(columns, task, "place")


@pytest.mark.parametrize(
    ("cells", "names", "values"),
    [
        (["01", "10", "02", "01"], ("01", "02", "10"), [0, 2, 1, 0]),  # by value; the name as it is written
        (["1.0", "2", "1"], ("1", "2"), [0, 1, 0]),  # how pandas writes whole numbers beside empty cells
        (["1_1", "11", "1_1"], ("11", "1_1"), [1, 0, 1]),  # Python reads the first as 11
        (["cat", "-1", "dog"], ("cat", "dog"), [0, -1, 1]),  # -1 is no label, among names too
    ],
)
def test_names_are_as_they_are_written(cells, names, values):
    found = read(np.array(cells, dtype=object))
    assert found.names == names
    assert found.values.tolist() == values


@pytest.mark.parametrize("cells", [["01", "1"], ["7", "007", "8"], ["1", "1e0"]])
def test_two_spellings_of_a_number_may_be_two_classes(cells):
    with pytest.raises(DataError, match="are one number, written in two ways"):
        read(np.array(cells, dtype=object))
