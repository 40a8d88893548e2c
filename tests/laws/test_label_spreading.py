"""Label spreading against dense linear algebra, scikit-learn's own, and what scaling and cross-validation promise."""

import re

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn import semi_supervised
from ssl_ae_builtins import label_graph
from ssl_ae_builtins import label_spreading as rooms
from ssl_ae_builtins.label_graph import Memory, joined, nearest_others
from ssl_ae_builtins.label_spreading import (
    Graphs,
    LabelSpreading,
    balanced,
    calibrated,
    chosen,
    folds,
    settings_of,
    sharpened,
    spread,
)

from ssl_ae.trace import Shapes

N, K, C = 211, 7, 3


def head(classes=C, **options):
    return LabelSpreading(LabelSpreading.Config(**options), Shapes(x=(13,), latent=K, classes=classes, targets=None))


def rows(count=N, seed=0, labeled=0.3):
    """Overlapping clusters in three directions, some of them with labels."""
    random = np.random.default_rng(seed)
    y = random.integers(C, size=count)
    z = random.normal(size=(count, K)) + 2.5 * np.eye(K)[y]
    known = random.random(count) < labeled
    return torch.from_numpy(z).float(), torch.from_numpy(np.where(known, y, -1)), torch.from_numpy(y)


def by_hand(z, k, power):
    """W, (N, N) float64, as the docstring has it, without a graph library."""
    unit = (z - z.mean(0)).double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    near = np.zeros_like(cosines)
    for i, row in enumerate(np.argsort(-cosines, axis=1)[:, :k]):
        near[i, row] = np.clip(cosines[i, row], label_graph.LEAST_SIMILARITY, None) ** power
    return near + near.T


def labels_of(y):
    return torch.nn.functional.one_hot(y.clamp(min=0), C).float() * (y >= 0)[:, None]


def graph_of(z, k=5, power=3.0, metric="cosine"):
    z = z - z.mean(0)
    return joined(*nearest_others(z, metric, k), z, metric, power)


@pytest.mark.parametrize(("k", "power"), [(1, 1.0), (5, 3.0), (300, 2.0)])
def test_the_graph_is_the_normalised_symmetric_one(k, power):
    z, _, _ = rows()
    weights = by_hand(z, k, power)
    degree = weights.sum(1)
    np.testing.assert_allclose(graph_of(z, k, power).to_dense(), weights / np.sqrt(np.outer(degree, degree)), atol=1e-5)


def test_the_euclidean_graph_has_a_local_scale():
    """exp(-d^2 / s_i^2)^power with s_i the distance of the k-th neighbour, by scipy's distances."""
    z, _, _ = rows()
    distances = cdist(z.double(), z.double())
    np.fill_diagonal(distances, np.inf)
    weights = np.zeros((N, N))
    for i, row in enumerate(distances):
        near = row.argsort()[:5]
        weights[i, near] = np.exp(-3.0 * (row[near] / row[near[-1]]) ** 2)
    weights += weights.T
    degree = weights.sum(1)
    found = graph_of(z, metric="euclidean").to_dense()
    np.testing.assert_allclose(found, weights / np.sqrt(np.outer(degree, degree)), atol=1e-4)


def test_labels_choose_metric_and_neighbours():
    """Two rings around one middle: directions say nothing, distances do."""
    angle = torch.arange(120) / 120 * 2 * torch.pi
    ring = torch.arange(240) // 120
    z = torch.zeros(240, K)
    z[:, 0], z[:, 1] = (1 + ring) * angle.repeat(2).cos(), (1 + ring) * angle.repeat(2).sin()
    y = torch.where(torch.arange(240) % 2 == 0, ring, -1)
    one = head(2)
    one.fit(z, y)
    assert [*label_graph.METRICS][int(one.metric)] == "euclidean"
    assert (one.predict(z).probs.argmax(1) == ring).float().mean() > 0.99
    fixed = head(2, metric="cosine")
    fixed.fit(z, y)
    assert (fixed.predict(z).probs.argmax(1) == ring).float().mean() < 0.9


@pytest.mark.parametrize("alpha", [0.2, 0.9])
def test_spreading_ends_at_the_closed_form(alpha):
    """Zhou et al. 2004, eq. 4: F* = (1 - alpha) (I - alpha S)^-1 Y."""
    z, y, _ = rows()
    graph = graph_of(z)
    exact = (1 - alpha) * torch.linalg.solve(torch.eye(N).double() - alpha * graph.to_dense().double(), labels_of(y).double())
    torch.testing.assert_close(
        rooms.shares_of(spread(graph, labels_of(y), alpha)).double(), rooms.shares_of(exact), atol=2e-4, rtol=0
    )


def test_it_is_scikit_learns():
    z, y, _ = rows()
    weights = by_hand(z, 5, 3.0)
    theirs = semi_supervised.LabelSpreading(kernel=lambda a, b: weights, alpha=0.8, max_iter=1000, tol=1e-9)
    theirs.fit(z.numpy(), y.numpy())
    ours = rooms.shares_of(spread(graph_of(z), labels_of(y), 0.8))
    np.testing.assert_allclose(ours, theirs.label_distributions_, atol=2e-4)


def test_a_row_far_from_every_label_keeps_its_proportions():
    """A chain whose ends have labels: a label loses a factor of 20 a link, so its middle has some 1e-26 of each."""
    length = 41
    links = torch.diag(torch.full((length - 1,), 0.5), 1)
    labels = torch.zeros(length, 2)
    labels[0, 0] = labels[-1, 1] = 1
    found = rooms.shares_of(spread((links + links.T).to_sparse_csr(), labels, 0.1))
    exact = torch.linalg.solve(torch.eye(length).double() - 0.1 * (links + links.T).double(), labels.double())
    torch.testing.assert_close(found.double(), rooms.shares_of(exact), atol=1e-3, rtol=0)
    assert found[length // 2].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_diffusion_without_a_threshold_ends_at_the_harmonic_function():
    """Zhu, Ghahramani and Lafferty 2003, eq. 5: f_u = (D_uu - W_uu)^-1 W_ul f_l. On a ring all degrees are 2, so S = W / 2."""
    rows = torch.arange(29)
    weights = torch.zeros(29, 29).double()
    weights[rows, (rows + 1) % 29] = weights[(rows + 1) % 29, rows] = 1
    labels = torch.zeros(29, C).double()
    labels[0, 0] = labels[5, 1] = labels[17, 2] = 1
    free = labels.sum(1) == 0
    exact = labels.clone()
    exact[free] = torch.linalg.solve((2 * torch.eye(29) - weights)[free][:, free], weights[free][:, ~free] @ labels[~free])
    found = sharpened((weights / 2).to_sparse_csr(), labels, torch.ones(29, C).double(), rounds=400, power=1)
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)


def test_sharpening_moves_the_border_to_the_gap():
    """Clouds of 97 rows that touch, two labels in one and one in the other: two outvote one beyond the gap, 8 draws of both."""
    cloud, errors = torch.arange(194) // 97, np.zeros(2)
    for seed in range(8):
        plane = torch.randn(194, 2, generator=torch.Generator().manual_seed(seed)) + torch.stack([3.6 * cloud, 0 * cloud], 1)
        weights = (torch.cdist(plane, plane) < 0.8).float().fill_diagonal_(0)
        degree = weights.sum(1)
        graph = (weights / (degree[:, None] * degree).sqrt().clamp(min=1)).to_sparse_csr()
        labels = torch.zeros(194, 2)
        labels[:2, 0] = labels[-1, 1] = 1
        mass = spread(graph, labels, 0.9)
        both = mass, sharpened(graph, labels, mass, rounds=20)
        errors += [int((p.argmax(1) != cloud)[degree > 0].sum()) for p in both]
    assert errors[1] < 0.8 * errors[0], errors


def test_where_no_label_comes_sharpening_knows_nothing():
    """Two pairs of rows without a link between them, and a label in one pair alone."""
    pair = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    labels = torch.zeros(4, C)
    labels[0, 1] = 1
    graph = torch.block_diag(pair, pair).to_sparse_csr()
    found = sharpened(graph, labels, spread(graph, labels, 0.9), rounds=3)
    assert found.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_scaling_reaches_the_prior_and_keeps_the_odds_ratios():
    """Sinkhorn 1967: the limit is D1 p D2, so (p_ic p_jd) / (p_id p_jc) stays, and both margins are met."""
    p = torch.distributions.Dirichlet(torch.ones(C)).sample((N,)).double()
    prior = torch.tensor([0.5, 0.3, 0.2]).double()
    found = balanced(p, prior)
    torch.testing.assert_close(found.mean(0), prior, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(N).double())
    odds = [(q[:-1, 0] * q[1:, 1]) / (q[:-1, 1] * q[1:, 0]) for q in (p, found)]
    torch.testing.assert_close(*odds)


def uneven(y):
    """Labels y (N,) with 7 of the first class alone."""
    found = y.clone()
    found[torch.nonzero(y == 0)[7:, 0]] = -1
    return found


def test_classes_of_equal_mass_are_told_apart_by_their_mean_label():
    """F_c / n_c of the closed form: classes count alike, however many labels each has."""
    z, y, _ = rows()
    y = uneven(y)
    one = head(k=5, power=3.0, alpha=0.8, metric="cosine", class_mass="equal")
    one.fit(z, y)
    weights = by_hand(z, 5, 3.0)
    degree = weights.sum(1)
    system = np.eye(N) - 0.8 * weights / np.sqrt(np.outer(degree, degree))
    mass = np.linalg.solve(system, labels_of(y).numpy()) / labels_of(y).sum(0).numpy()
    graphs, settings = Graphs(graph_of(z), graph_of(z)), [rooms.Setting("cosine", 5, 0.8)]
    exponent = chosen(lambda setting: graphs, y, C, settings, weigh=rooms.alike).exponent
    torch.testing.assert_close(one.p.double(), calibrated(torch.from_numpy(mass), exponent), atol=2e-3, rtol=0)
    counted = head(k=5, power=3.0, alpha=0.8, metric="cosine")
    counted.fit(z, y)
    assert (one.p[:, 0] > counted.p[:, 0]).float().mean() > 0.95  # of 7 labels beside some 20 a class


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_class", [rooms.FOLDS - 1, rooms.FOLDS, 2 * rooms.FOLDS])
def test_equally_many_labels_have_equal_mass_already(per_class, seed):
    """Also in every fold: as many of each class are left, or none is held out; of 7 a class, 5 of one and 6 of another."""
    z, _, truth = rows(seed=seed)
    y = torch.full_like(truth, -1)
    for c in range(C):
        y[torch.nonzero(truth == c)[:per_class, 0]] = c
    counted, equal = (head(sharpen=3, class_mass=how) for how in ("labels", "equal"))
    for one in (counted, equal):
        one.fit(z, y)
    assert torch.equal(counted.p, equal.p)


def test_what_a_label_weighs():
    assert rooms.alike(torch.tensor([2.0, 6.0, 0.0, 4.0])).tolist() == [2.0, pytest.approx(4 / 6), 0.0, 1.0]  # 12 / 3 a class


@pytest.mark.parametrize("weigh", rooms.CLASS_MASSES.values(), ids=rooms.CLASS_MASSES)
@pytest.mark.parametrize(("alpha", "sharpen"), [(0.5, 0), (0.9, 0), (0.9, 2)])
def test_cross_validation_is_spreading_without_the_fold(alpha, sharpen, weigh):
    z, y, _ = rows()
    y = uneven(y)
    graphs, known = Graphs(graph_of(z), graph_of(z, k=3)), torch.nonzero(y >= 0)[:, 0]
    fold = folds(y[known])
    losses, exponent = rooms.likeliest(rooms.without_fold(graphs, y, known, fold, C, alpha, sharpen, weigh), y[known])
    for number in range(rooms.FOLDS):
        without = y.clone()
        without[known[fold == number]] = -1
        labels = labels_of(without)
        mass = sharpened(graphs.narrow, labels, spread(graphs.wide, labels * weigh(labels.sum(0)), alpha), sharpen)
        p = rooms.shares_of(calibrated(rooms.shares_of(mass), exponent) + rooms.LEAST)
        held = known[fold == number]
        expected = -p[held, y[held]].log()
        torch.testing.assert_close(losses[fold == number], expected, atol=5e-3, rtol=5e-3)


def test_few_labels_choose_nothing():
    _, y, _ = rows()
    few = torch.full_like(y, -1)
    for c in range(C):
        few[torch.nonzero(y == c)[: rooms.FOLDS - 1, 0]] = c
    safe = (rooms.SAFE_METRIC, rooms.SAFE_K, rooms.SAFE_ALPHA)
    everything = LabelSpreading.Config(k="auto", metric="auto", alpha="auto")
    assert len(settings_of(everything, rooms.MANY)) == 24
    assert len(settings_of(everything, rooms.MANY - 1)) == 4  # of alpha alone
    assert chosen(None, few, C, settings_of(everything, rooms.MANY))[:2] == (safe, 1.0)
    assert chosen(None, few, C, settings_of(LabelSpreading.Config(alpha=0.3, k=4), 12))[:2] == (("cosine", 4, 0.3), 1.0)


def said(y, **options):
    z, _, _ = rows()
    one = head(**options)
    one.fit(z, y)
    return one.found


def test_what_was_chosen_is_told():
    _, y, truth = rows()
    assert said(y, k=4, metric="cosine", alpha=0.3) is None
    few = said(y, metric="euclidean")
    assert re.fullmatch(
        r"head label_spreading took k 10, alpha 0\.\d+ by the log-loss of 70 labels, held out in turn: 0\.\d{3}, "
        r"(the safe setting|by the safe setting 0\.\d{3})\. From 100 labels on it chooses k, too\.",
        few.said[0],
    )
    many = said(truth)
    assert re.match(r"head label_spreading took metric (cosine|euclidean), k (5|10|20), alpha 0\.\d+ by", many.said[0])
    assert "From" not in many.said[0]
    assert {*many.metrics} == {"head/k", "head/alpha", "head/nll"}
    assert said(y, alpha=0.9).said == (
        "head label_spreading keeps metric cosine, k 10: it chooses metric and k from 100 labels on.",
    )
    one = torch.where(torch.arange(N) < 3, truth, -1)
    assert said(one).said == (
        "head label_spreading keeps metric cosine, k 10, alpha 0.9: too few of the 3 labels can be held out.",
    )


def test_a_class_of_few_labels_is_never_held_out():
    """It stops nobody else from choosing, and all its labels spread while others are held out."""
    z, y, _ = rows(503)
    y[torch.nonzero(y == 0)[rooms.FOLDS - 1 :, 0]] = -1
    known = torch.nonzero(y >= 0)[:, 0]
    fold = folds(y[known])
    assert ((fold < 0) == (y[known] == 0)).all()
    graphs = Graphs(graph_of(z), graph_of(z))
    found = rooms.without_fold(graphs, y, known, fold, C, 0.9)
    for number in range(rooms.FOLDS):
        without = y.clone()
        without[known[fold == number]] = -1
        expected = rooms.shares_of(spread(graphs.wide, labels_of(without), 0.9))
        torch.testing.assert_close(found[fold == number], expected[known[fold == number]], atol=5e-3, rtol=5e-3)
    assert chosen(lambda setting: graphs, y, C, [rooms.Setting("cosine", 5, 0.9)])[1] != 1.0


def test_calibration_makes_unseen_labels_likelier(monkeypatch):
    """Labels that have travelled far are everywhere: raw shares are much flatter than the rows are mixed."""
    z, y, truth = rows(2003, labeled=0.1)
    one, raw = head(alpha=0.99), head(alpha=0.99)
    one.fit(z, y)
    monkeypatch.setattr(rooms, "chosen", lambda graphs, y, classes, settings, *how: rooms.Choice(settings[0], 1.0))
    raw.fit(z, y)
    losses = [-found.predict(z).log_prob(truth)[y < 0].mean() for found in (one, raw)]
    assert losses[0] < 0.9 * losses[1]


def test_a_prediction_is_the_vote_of_the_nearest():
    z, y, _ = rows()
    one = head(k=5, power=3.0, alpha=0.8)
    one.fit(z, y)
    new, _, _ = rows(17, seed=4)
    unit = torch.nn.functional.normalize(new - z.mean(0), dim=1)
    cosines = unit @ torch.nn.functional.normalize(z - z.mean(0), dim=1).T
    near = cosines.argsort(dim=1, descending=True)[:, :5]
    weight = cosines.gather(1, near).clamp(min=label_graph.LEAST_SIMILARITY) ** 3
    votes = (one.p[near] * weight[:, :, None]).sum(1) / weight.sum(1, keepdim=True) + rooms.LEAST
    torch.testing.assert_close(one.predict(new).probs, votes / votes.sum(1, keepdim=True))
    alone = torch.cat([one.predict(new[i : i + 1]).probs for i in range(17)])
    torch.testing.assert_close(alone, one.predict(new).probs)


def test_unlabelled_rows_bend_the_boundary():
    """Two rings with one label each: no line or nearest label parts them, a walk along them does."""
    angle = torch.arange(400) / 200 * 2 * torch.pi
    ring = (torch.arange(400) >= 200).long()
    z = torch.stack([angle.cos(), angle.sin(), 2.0 * ring - 1, *torch.zeros(4, 400)], dim=1)
    z[:, 2] *= 0.15
    y = torch.full((400,), -1)
    y[0], y[300] = 0, 1
    one = head(2, k=3, alpha=0.99, power=8.0)
    one.fit(z, y)
    assert (one.predict(z).probs.argmax(1) == ring).float().mean() > 0.95


@pytest.mark.parametrize("sharpen", [0, 3])
def test_rows_that_are_near_nothing_are_equally_near_to_all(sharpen):
    """Three directions 120 degrees apart: each cosine is negative, and its least positive number to the 12th is 0 in float32."""
    angle = torch.arange(3) / 3 * 2 * torch.pi
    z = torch.zeros(3, K)
    z[:, 0], z[:, 1] = angle.cos(), angle.sin()
    one = head(k=2, power=12.0, sharpen=sharpen)
    one.fit(z, torch.tensor([0, 1, -1]))
    torch.testing.assert_close(one.p[2], torch.tensor([0.5, 0.5, 0.0]), atol=1e-4, rtol=0)
    assert one.predict(-z).probs.isfinite().all()


@pytest.mark.parametrize("class_mass", rooms.CLASS_MASSES)
@pytest.mark.parametrize("prior", ["none", "uniform", "labels", (0.2, 0.3, 0.5)])
def test_degenerate_tables(prior, class_mass):
    """One class, one label, twins, a row of zeros, fewer rows than neighbours: finite probabilities that sum to one."""
    one = head(prior=prior, class_mass=class_mass)
    z = torch.zeros(13, K)
    z[5:] = torch.randn(8, K, generator=torch.Generator().manual_seed(0))
    for y in (torch.tensor([1] * 13), torch.tensor([-1] * 12 + [2]), torch.tensor([0, 1] + [-1] * 11)):
        one.fit(z, y)
        p = one.predict(torch.cat([z, torch.randn(3, K)])).probs
        assert p.isfinite().all()
        torch.testing.assert_close(p.sum(1), torch.ones(16))
    alone = head(prior=prior, class_mass=class_mass)
    alone.fit(z[7:8], torch.tensor([2]))
    assert alone.predict(z[7:9]).probs.argmax(1).tolist() == [2, 2]


def test_a_prior_has_a_number_for_each_class():
    found = list(LabelSpreading.check(LabelSpreading.Config(prior=(0.5, 0.5)), type("Resolved", (), {"shapes": head().shapes})))
    assert found == ["model.head.prior has 2 numbers: expected 3, one a class."]


@pytest.fixture
def fresh(monkeypatch):
    """A process that remembers nothing yet; what graphs and neighbours it makes, (k, metric, power) and (metric, k)."""
    made, looked = [], []
    monkeypatch.setattr(label_graph, "GRAPHS", Memory(3))
    monkeypatch.setattr(label_graph, "NEAR", Memory(4))
    monkeypatch.setattr(
        label_graph,
        "joined",
        lambda products, near, z, *how: made.append((near.shape[1], *how)) or joined(products, near, z, *how),
    )
    monkeypatch.setattr(label_graph, "nearest_others", lambda z, *how: looked.append(how) or nearest_others(z, *how))
    return made, looked


def test_the_graph_of_the_same_latents_is_made_once(fresh):
    """Other labels wait for no neighbours; other latents, another k or power do; and no more graphs are kept than promised."""
    made, looked = fresh
    z, y, truth = rows()

    def fitted(z, y, **options):
        found = head(**({"k": 10, "metric": "cosine"} | options))
        found.fit(z, y)
        return found.p

    alone = fitted(z, truth)
    assert not torch.equal(fitted(z.clone(), y), alone)
    assert len(made) == 1
    assert torch.equal(fitted(z, truth), alone)
    for other in ({"k": 4}, {"power": 2.0}, {"metric": "euclidean"}):
        fitted(z, y, **other)
    fitted(z + torch.eye(N, K), y)
    usual = (10, "cosine", 4.0)
    assert made == [usual, (4, "cosine", 4.0), (10, "cosine", 2.0), (10, "euclidean", 4.0), usual]
    assert looked == [("cosine", 10), ("cosine", 4), ("euclidean", 10), ("cosine", 10)]  # the power asks for no others
    assert len(label_graph.GRAPHS.held) == 3
    assert torch.equal(fitted(z, truth), alone)  # forgotten, and made again
    assert len(made) == 6


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_memory_holds_as_many_as_it_may(most):
    """The one that was asked for longest ago goes first."""
    memory, made = Memory(most), []
    vectors = torch.eye(most + 1)

    def ask(row):
        return memory(lambda: made.append(row) or row, [vectors[row]], "how")

    assert [ask(row) for row in [*range(most), *range(most)]] == [*range(most)] * 2
    assert made == [*range(most)]
    ask(most)  # the first goes
    assert ask(most - 1) == most - 1
    assert len(made) == most + (2 if most == 1 else 1)
    ask(0)
    assert made[-1] == 0
    assert len(memory.held) == most


def test_every_k_that_is_tried_takes_from_the_same_neighbours(fresh):
    made, looked = fresh
    z, y, truth = rows()
    head().fit(z, truth)  # more labels than a choice needs
    assert looked == [("cosine", 20), ("euclidean", 20)]
    assert {(k, metric) for k, metric, _ in made} == {(k, metric) for k in rooms.NEIGHBOURS for metric in label_graph.METRICS}
    looked.clear()
    few = head()
    few.fit(z, y)  # fewer
    assert (int(few.k), int(few.metric)) == (rooms.SAFE_K, 0)
    assert looked == []
