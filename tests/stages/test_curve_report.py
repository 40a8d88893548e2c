"""What a label curve says in words: the control that counts, and when a method helped."""

import pytest

from ssl_ae.stages.curve_report import Report


def report(task="classes", **figures):
    """One number of labels; the figures of each method by draw. Names with a dash in front are controls."""
    name = {"classes": "accuracy", "regression": "rmse"}[task]
    rows = [
        {"labels": 1_000, "seed": seed, "method": method.replace("_", "-"), name: value, "seconds": 0.1}
        for method, values in figures.items()
        for seed, value in enumerate(values)
    ]
    methods = [method.replace("_", "-") for method in figures if method.startswith("ours")]
    controls = [method.replace("_", "-") for method in figures if not method.startswith("ours")]
    return Report(rows, methods, controls, task)


def verdicts(found):
    return found.verdicts([*found.comparisons()])


def test_the_best_control_and_labels_only_are_what_counts():
    found = report(ours=[0.9, 0.9], labels_only=[0.5, 0.6], pca_one=[0.7, 0.8], pca_two=[0.8, 0.6])
    assert [comparison.control for comparison in found.comparisons()] == ["pca-one", "labels-only"]  # 0.75 against 0.7
    found = report(ours=[0.9, 0.9], labels_only=[0.5, 0.6], labels_only_augmented=[0.6, 0.6], pca_one=[0.7, 0.8])
    assert [comparison.control for comparison in found.comparisons()] == ["pca-one", "labels-only", "labels-only-augmented"]
    found = report(ours=[0.9, 0.9], labels_only=[0.8, 0.8], pca_one=[0.7, 0.8])
    assert [comparison.control for comparison in found.comparisons()] == ["labels-only"]


def test_smaller_errors_are_better():
    found = report("regression", ours=[1.0, 1.1], labels_only=[2.0, 2.2], pca_one=[3.0, 3.1])
    (comparison,) = found.comparisons()
    assert (comparison.control, comparison.helped) == ("labels-only", True)
    assert not verdicts(found)


def test_better_by_more_than_chance_is_not_mentioned():
    assert not verdicts(report(ours=[0.8, 0.81, 0.82], labels_only=[0.7, 0.71, 0.73]))


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ([0.80, 0.70, 0.78], [0.80, 0.71, 0.79], "it is no better than labels-only"),  # -0.7 points, and p = 0.18
        ([0.60, 0.61, 0.62], [0.70, 0.71, 0.73], "it is worse than labels-only"),
        ([0.70, 0.71], [0.70, 0.71], "it is no better than labels-only"),
        ([0.70], [0.71], "it is no better than labels-only"),
    ],
)
def test_otherwise_it_is_said_plainly(ours, theirs, says):
    (told,) = verdicts(report(ours=ours, labels_only=theirs))
    assert told.startswith(f"the unlabelled data did not help ours at 1,000 labels: {says}, which has seen no unlabelled data: ")
    assert "%" in told


def test_what_may_be_chance_is_called_so():
    (told,) = verdicts(report(ours=[0.80, 0.70, 0.78], labels_only=[0.79, 0.71, 0.70]))  # +2.7 points, and p = 0.4
    assert told.startswith(
        "nothing shows that the unlabelled data helped ours at 1,000 labels: it is better than labels-only, which has seen no "
        "unlabelled data, perhaps by chance: "
    )


def test_several_numbers_of_labels_are_one_sentence():
    found = report(ours=[0.6, 0.61], pca_one=[0.7, 0.72])
    more = [row | {"labels": 3_000} for row in found.rows]
    (told,) = verdicts(Report([*found.rows, *more], found.methods, found.controls, found.task))
    assert told == (
        "at 1,000 and 3,000 labels ours is worse than pca-one, which has no network: accuracy 60.5 and 60.5 % against "
        "71.0 and 71.0 %, difference -10.5 ± 0.5 (p = 0.03) and -10.5 ± 0.5 (p = 0.03)."  # t = -21, p = 2 atan(1/21)/pi
    )


def test_a_draw_that_only_one_of_them_has_does_not_compare():
    found = report(ours=[0.6, 0.9], pca_one=[0.7])
    (comparison,) = found.comparisons()
    assert comparison.difference.pairs == 1
    assert comparison.ours == 0.6
