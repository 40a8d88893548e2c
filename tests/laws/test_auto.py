"""head auto: forests against scikit-learn's, what is held out, what is taken, and what a user is told."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from ssl_ae_builtins import auto as rooms
from ssl_ae_builtins import label_spreading as spreading
from ssl_ae_builtins.auto import NAMES, NETWORK, Auto
from ssl_ae_builtins.forests import Forest, floored
from ssl_ae_builtins.label_graph import joined, nearest_others
from ssl_ae_builtins.label_spreading import LabelSpreading, calibrated, spread
from ssl_ae_builtins.selection import choose, stratified, too_few

from ssl_ae.trace import Shapes

FITTED = [name for name in NAMES if name != NETWORK]  # what is there without a network
N, K, D, C, L = 211, 5, 7, 3, 41


def shapes(latent=K, classes=C):
    return Shapes(x=(D,), latent=latent, classes=classes, targets=None)


def auto(**options):
    return Auto(Auto.Config(**{"trees": 11, "repeats": 1, **options}), shapes())


def table(told_by, seed=0, labels=L):
    """z (N, K), x (N, D), the classes, and y with so many labels; only the one named has anything to do with the classes."""
    random = np.random.default_rng(seed)
    truth = random.integers(C, size=N)
    found = {"z": random.normal(size=(N, K)), "x": random.normal(size=(N, D))}
    found[told_by] += 3.0 * np.eye(C, found[told_by].shape[1])[truth]
    y = np.full(N, -1)
    known = np.sort(random.permutation(N)[:labels])
    y[known] = truth[known]
    z, x = (torch.from_numpy(found[name]).float() for name in ("z", "x"))
    return z, x, torch.from_numpy(truth), torch.from_numpy(y)


# --- forests


@pytest.mark.parametrize("repeated", [False, True])
def test_a_forest_is_scikit_learns(repeated):
    """The leaf of every row, also of rows whose features are a threshold; and its probabilities, with classes nobody labelled."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(101, K)).astype(np.float32), random.integers(1, 4, 101)
    x = x.round() if repeated else x  # equal rows of several classes end in leaves that are not pure
    theirs = RandomForestClassifier(13, random_state=0).fit(x, y)
    ours = Forest(Forest.Config(trees=13), shapes(classes=5))
    ours.fit(torch.from_numpy(x), torch.from_numpy(y))
    edges = np.concatenate([tree.tree_.threshold[tree.tree_.feature >= 0] for tree in theirs.estimators_])
    edges = np.concatenate([np.nextafter(edges.astype(np.float32), np.float32(end)) for end in (-np.inf, np.inf)])
    new = np.concatenate([x, random.normal(size=(997, K)), np.repeat(edges[:, None], K, 1)]).astype(np.float32)
    np.testing.assert_array_equal(ours.leaves(torch.from_numpy(new)) - ours.roots, theirs.apply(new))
    expected = theirs.predict_proba(new)  # float64
    shares = (ours.shares[ours.leaves(torch.from_numpy(new))].sum(1) / 13)[:, 1:4].numpy()
    if repeated:
        np.testing.assert_allclose(shares, expected, atol=1e-6)
    else:
        np.testing.assert_array_equal(shares, expected.astype(np.float32))  # whole votes are exact in float32
    smooth = (13 * np.pad(expected, ((0, 0), (1, 1))) + 1 / 5) / 14
    np.testing.assert_allclose(ours.predict(torch.from_numpy(new)).probs, smooth, atol=1e-6)


def test_thresholds_in_float32_part_the_same_numbers():
    thresholds = np.random.default_rng(0).normal(size=1009) * 10.0 ** np.random.default_rng(1).integers(-20, 20, 1009)
    near = thresholds.astype(np.float32)
    for x in (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))):
        np.testing.assert_array_equal(x <= floored(thresholds), x.astype(np.float64) <= thresholds)


# --- what is held out


def test_folds_show_classes_alike():
    y = torch.tensor([0] * 23 + [1] * 7 + [2] * 2)
    folds = stratified(y, 5, 3)
    assert folds.shape == (3, 32)
    for fold in folds:
        for rows in (fold, *(fold[y == label] for label in range(3))):
            counts = torch.bincount(rows, minlength=5)
            assert counts.max() - counts.min() <= 1
    assert not torch.equal(folds[0], folds[1])
    assert torch.equal(folds, stratified(y, 5, 3))
    assert stratified(y[:3], 5, 1).unique().tolist() == [0, 1, 2]


def test_held_out_probabilities_are_scikit_learns():
    _, x, _, y = table("x")
    x, y = x[y >= 0], y[y >= 0]
    fold = stratified(y, 5, 1)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    expected = cross_val_predict(theirs, x.numpy(), y.numpy(), cv=PredefinedSplit(fold[0].numpy()), method="predict_proba")
    found = rooms.refitted(rooms.logistic(Auto.Config(), shapes()), x, y, fold)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_out_of_bag_probabilities_are_scikit_learns():
    """Shares of the trees that have not seen a row, as scikit-learn finds them, with one more vote that is spread evenly."""
    _, x, _, y = table("x")
    x, y = x[y >= 0], y[y >= 0]
    theirs = RandomForestClassifier(26, random_state=0, oob_score=True, max_samples=0.8).fit(x.numpy(), y.numpy())
    unseen = np.stack([~np.isin(np.arange(L), rows) for rows in theirs.estimators_samples_]).sum(0)[:, None]
    one = Forest(Forest.Config(trees=13), shapes())
    found = one.held_out(x, y, stratified(y, 5, 2))
    assert found.shape == (2, L, C)
    for repeat in found:
        np.testing.assert_allclose(repeat, (unseen * theirs.oob_decision_function_ + 1 / C) / (unseen + 1), atol=1e-6)
    alone = Forest(Forest.Config(trees=1), shapes()).held_out(x, y, stratified(y, 2, 1))[0]
    torch.testing.assert_close(alone.sum(1), torch.ones(L))  # also of rows that every tree has seen


def test_held_out_spreading_is_spreading_without_the_fold():
    z, _, _, y = table("z")
    one, fold = LabelSpreading(LabelSpreading.Config(alpha=0.9), shapes()), stratified(y[y >= 0], 4, 2)
    found = one.held_out(z, y, fold)
    known, centred = torch.nonzero(y >= 0)[:, 0], z - z.mean(0)
    graph = joined(*nearest_others(centred, "cosine", 10), centred, "cosine", 4.0)
    exponent = spreading.chosen(lambda setting: spreading.Graphs(graph, graph), y, C, spreading.settings_of(one.config, L))[1]
    assert found.shape == (2, L, C)
    for repeat in range(2):
        for number in range(4):
            held = fold[repeat] == number
            without = y.clone()
            without[known[held]] = -1
            labels = torch.nn.functional.one_hot(without.clamp(min=0), C).float() * (without >= 0)[:, None]
            expected = calibrated(spreading.shares_of(spread(graph, labels, 0.9)), exponent)[known[held]]
            torch.testing.assert_close(found[repeat, held], expected, atol=5e-3, rtol=5e-3)


def test_a_label_has_no_say_while_it_is_held_out():
    _, x, _, y = table("x")
    x, y = x[y >= 0], y[y >= 0]
    fold = stratified(y, 5, 1)
    other = torch.where(fold[0] == 2, (y + 1) % C, y)
    found = [rooms.refitted(rooms.logistic(Auto.Config(), shapes()), x, labels, fold)[0] for labels in (y, other)]
    assert torch.equal(found[0][fold[0] == 2], found[1][fold[0] == 2])
    assert not torch.equal(found[0], found[1])
    one, other = Forest(Forest.Config(trees=13), shapes()), y.clone()
    other[3] = (other[3] + 1) % C
    found = [one.held_out(x, labels, fold)[0] for labels in (y, other)]
    assert torch.equal(found[0][3], found[1][3])
    assert not torch.equal(found[0], found[1])


# --- what is taken


def answers(right, y, sure=0.8):
    """(1, L, C) probabilities with `sure` at the true class of the rows in `right` (L,), at the next class elsewhere."""
    p = torch.full((1, len(y), C), (1 - sure) / (C - 1))
    p[0, torch.arange(len(y)), torch.where(right, y, (y + 1) % C)] = sure
    return p


def test_the_margin_is_a_standard_error_of_the_difference():
    """By hand: a row that is right costs (1 - 0.8)^2 + 2 * 0.1^2 = 0.06, a wrong one 0.8^2 + 0.9^2 + 0.1^2 = 1.46, 1.4 more."""
    y = torch.arange(100) % C
    row = torch.arange(100)
    simple = answers(row >= 20, y)
    for better, worse, taken in ((9, 5, "complex"), (9, 6, "simple"), (4, 1, "complex"), (3, 1, "simple"), (0, 0, "simple")):
        # of 100 rows so many are right in the complex one alone, or wrong in it alone
        right = (row >= 20) & ~((row >= 20) & (row < 20 + worse)) | (row < better)
        mean = 1.4 * (better - worse) / 100
        error = (((better + worse) * 1.4**2 - 100 * mean**2) / 99) ** 0.5 / 10
        choice = choose({"simple": simple, "complex": answers(right, y)}, y)
        assert choice.taken == taken == ("complex" if mean > error else "simple")
        assert float(choice.losses["simple"].brier.mean()) == pytest.approx(0.8 * 0.06 + 0.2 * 1.46)
        assert float(choice.losses["simple"].error.mean()) == pytest.approx(0.2)
        assert float(choice.losses["simple"].nll.mean()) == pytest.approx(-0.8 * np.log(0.8) - 0.2 * np.log(0.1))


def test_each_is_compared_with_the_one_taken_before():
    y = torch.arange(100) % C
    parts = {"a": 40, "b": 20, "c": 19, "d": 0}
    held_out = {name: answers(torch.arange(100) >= wrong, y) for name, wrong in parts.items()}
    assert choose(held_out, y).taken == "d"
    del held_out["d"]
    assert choose(held_out, y).taken == "b"  # one row of 100 is no surer than its own standard error
    assert choose(held_out, y).reason == (
        "its Brier score on held-out labels is better by 0.280 ± 0.056 than that of a"  # 1.4 * 0.2; 1.4 * sqrt(0.16 / 99)
    )


@pytest.mark.parametrize(("told_by", "reads"), [("x", "samples"), ("z", "latents")])
def test_it_takes_what_tells_the_classes(told_by, reads):
    z, x, truth, y = table(told_by)
    one = auto()
    one.fit(z, y, x[y >= 0])
    taken = NAMES[int(one.taken)]
    assert taken.endswith(reads)
    assert (one.predict(z, x).probs.argmax(1) == truth)[y < 0].float().mean() > 0.85
    assert {name.split(".")[1] for name in one.state_dict() if "." in name} == {taken}  # nothing else is stored
    found = one.found
    assert found.metrics[f"head/{taken}/taken"] == 1
    assert sum(found.metrics[f"head/{name}/taken"] for name in FITTED) == 1
    assert bool(found.warnings) == (told_by == "x")
    assert found.said[0].startswith(f"head auto took {taken.replace('-', ' on ')}: ")
    if told_by == "x":
        assert found.warnings[0].startswith("the latents were no help: on held-out labels ")


def test_the_table_is_what_the_choice_was_made_of():
    z, x, _, y = table("x")
    one = auto(repeats=2)
    one.fit(z, y, x[y >= 0])
    found = one.found
    labels = y[y >= 0]
    p = rooms.refitted(one.candidates["logistic-samples"], x[y >= 0], labels, stratified(labels, 5, 2))
    hits = (p.argmax(2) == labels).double().mean(0).numpy()
    mean, error = hits.mean(), hits.std(ddof=1) / L**0.5
    assert found.metrics["head/logistic-samples/accuracy"] == pytest.approx(mean)
    assert found.metrics["head/logistic-samples/accuracy_se"] == pytest.approx(error)
    assert [row[0] for row in found.rows] == [name.replace("-", " on ") for name in FITTED]
    assert found.rows[0][1] == f"{100 * mean:.1f} ± {100 * error:.1f} %"
    assert [row[4] for row in found.rows].count("taken") == 1


def test_fitted_again_it_forgets():
    z, x, _, y = table("z")
    one, other = auto(), auto()
    one.fit(*(part for part in (z, y, x[y >= 0])))
    z, x, _, y = table("x", seed=1)
    for head in (one, other):
        head.fit(z, y, x[y >= 0])
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, 2] * 3, "9 labels are too few to choose by (10 are needed)"),
        ([0] * 11 + [1, 2], "fewer than two classes have two labels"),
        ([1] * 12, "fewer than two classes have two labels"),
    ],
)
def test_too_few_labels_keep_logistic_regression_on_the_samples(labels, said):
    z, x, _, _ = table("z")
    y = torch.full((N,), -1)
    y[5 : 5 + len(labels)] = torch.tensor(labels)
    one = auto()
    one.fit(z, y, x[y >= 0])
    assert NAMES[int(one.taken)] == "logistic-samples"
    assert one.found.warnings == (f"head auto keeps logistic on samples: {said}.",)
    assert not one.found.rows
    p = one.predict(z, x).probs
    assert p.isfinite().all()
    assert bool((p > 0).all())
    if len(set(labels)) > 1:
        theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[y >= 0].numpy(), labels)
        np.testing.assert_allclose(p[:, : max(labels) + 1], theirs.predict_proba(x.numpy()), atol=1e-4)


def test_ten_labels_of_two_classes_choose():
    assert too_few(torch.tensor([0] * 8 + [2] * 2), "simplest") is None


def test_classes_count_as_often_as_labels_show_them():
    """Logistic regression whose intercept has no penalty predicts the labels' own frequencies on average: none is balanced."""
    random = np.random.default_rng(0)
    truth = torch.from_numpy(random.choice(C, size=N, p=[0.8, 0.15, 0.05]))
    z, x = (torch.from_numpy(random.normal(size=(N, width))).float() for width in (K, D))
    one = auto()
    one.fit(z, truth, x)
    frequencies = torch.bincount(truth, minlength=C) / N
    torch.testing.assert_close(one.predict(z, x).probs.mean(0), frequencies, atol=0.02, rtol=0)


def test_of_very_many_labels_some_choose_and_all_teach(monkeypatch):
    monkeypatch.setattr(rooms, "MOST", 40)
    z, x, _, y = table("x", labels=101)
    one = auto()
    one.fit(z, y, x[y >= 0])
    assert one.found.title.startswith("34 labels")  # one in three
    assert NAMES[int(one.taken)] == "logistic-samples"
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[y >= 0].numpy(), y[y >= 0].numpy())
    np.testing.assert_allclose(one.predict(z, x).probs, theirs.predict_proba(x.numpy()), atol=1e-4)


def test_many_labels_are_held_out_once(monkeypatch):
    seen = []
    monkeypatch.setattr(rooms, "stratified", lambda y, folds, repeats: seen.append(repeats) or stratified(y, folds, repeats))
    for labels in (L, 149, 151):
        z, x, _, y = table("x", labels=labels)
        auto(repeats=2, trees=1).fit(z, y, x[y >= 0])
    assert seen == [2, 2, 1]
