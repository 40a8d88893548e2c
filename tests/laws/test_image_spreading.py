"""The image distortion model by loops over its definition, and what a second look at the neighbours does to a graph."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import ndimage
from ssl_ae_builtins import image_spreading
from ssl_ae_builtins.image_distance import bent, contexts, distances, gradients
from ssl_ae_builtins.image_spreading import ImageLabelSpreading, principal
from ssl_ae_builtins.label_graph import Memory, joined, nearest_others, symmetric
from ssl_ae_builtins.label_spreading import LabelSpreading, Setting

from ssl_ae.trace import Shapes

N, K, C = 53, 5, 3


def images(count=N, shape=(2, 7, 5), seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def head(shape=(2, 7, 5), **options):
    return ImageLabelSpreading(ImageLabelSpreading.Config(**options), Shapes(x=shape, latent=K, classes=C, targets=None))


def by_loops(found, near, window, step):
    """sum over p of min over d of |c(p) - c'(p + d)|^2, 0 outside, as Keysers et al. write it; float64."""
    found = found.double().numpy()
    wide = np.pad(found, [(0, 0), (0, 0), (window, window), (window, window)])
    reach = range(2 * window + 1)
    distance = np.zeros(near.shape)
    for (i, m), other in np.ndenumerate(near.numpy()):
        for a, b in product(range(0, found.shape[2], step), range(0, found.shape[3], step)):
            ways = [np.square(found[i, :, a, b] - wide[other, :, a + u, b + v]).sum() for u, v in product(reach, reach)]
            distance[i, m] += min(ways)
    return distance


@pytest.mark.parametrize("window", [0, 1, 2, 3])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 8, 6), (2, 1, 11)])
def test_the_distance_is_its_definition(shape, step, window, monkeypatch):
    maps = images(7, shape) - 0.5
    near = torch.randint(7, (7, 4), generator=torch.Generator().manual_seed(1))
    wanted = by_loops(maps, near, window, step)
    np.testing.assert_allclose(bent(maps, near, window, step), wanted, rtol=1e-4)
    monkeypatch.setattr("ssl_ae_builtins.image_distance.AT_ONCE", 1)  # a row at a time: the same
    np.testing.assert_allclose(bent(maps, near, window, step), wanted, rtol=1e-4)


def test_gradients_are_sobels():
    """scipy's, whose kernel is four times ours and turned round."""
    x = images(3)
    found = gradients(x)
    for row, channel in product(range(3), range(2)):
        for k, axis in enumerate((1, 0)):
            wanted = -ndimage.sobel(x[row, channel].numpy(), axis=axis, mode="nearest") / 4
            np.testing.assert_allclose(found[row, 2 * channel + k], wanted, atol=1e-6)


def test_all_contexts_keep_all_distances():
    """All 9 * 2 * 2 directions of a context are a rotation of it: the norm of what is inside is that of 3 x 3 gradients."""
    x = images(11)
    found, plain = contexts(x, 100), torch.nn.functional.unfold(gradients(x), 3, padding=1).unflatten(2, (7, 5))
    assert found.shape == (11, 36, 7, 5)
    torch.testing.assert_close(
        (found[1:] - found[:-1]).square().sum(1), (plain[1:] - plain[:-1]).square().sum(1), rtol=1e-4, atol=1e-5
    )
    kept = contexts(x, 3)
    torch.testing.assert_close(kept.square().sum((0, 2, 3)), found.square().sum((0, 2, 3))[:3], rtol=1e-4, atol=1e-4)
    assert (found.square().sum((0, 2, 3)).diff() < 1e-3).all()  # the largest first


@pytest.mark.parametrize(
    ("shift", "forgiven"), [((0, 0), True), ((2, -2), True), ((-1, 2), True), ((3, 0), False), ((0, -4), False)]
)
def test_a_shift_within_the_window_is_forgiven(shift, forgiven):
    """What moves by up to two pixels looks the same to every pixel but those where it was: they look for what is near."""
    x = torch.zeros(2, 1, 19, 19)
    x[0, 0, 8:11, 7:12] = images(1, (3, 5))[0]
    x[1] = x[0].roll(shift, dims=(1, 2))
    near = torch.tensor([[1], [0]])
    apart, rigid = bent(contexts(x, 3), near, 2, 1)[0, 0], bent(contexts(x, 3), near, 0, 1)[0, 0]
    if forgiven:
        assert apart <= 1e-10
        assert shift == (0, 0) or rigid > 0.1
    else:
        assert apart > 0.01


def test_large_images_are_looked_at_every_second_pixel():
    near = torch.tensor([[1, 2], [0, 2], [1, 0]])
    for side, step in ((15, 1), (16, 2)):
        x = images(3, (1, side, side + 1))
        torch.testing.assert_close(distances(x, near, 1), bent(contexts(x, 3), near, 1, step))


def by_hand(z, x, k, power, candidates, window):
    """S of the second look in float64: the k of the smallest distances among the candidates of the largest cosines."""
    unit = (z - z.mean(0)).double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    near = np.argsort(-cosines, axis=1)[:, :candidates]
    apart = by_loops(contexts(x, 3), torch.from_numpy(near), window, 1)
    order = np.argsort(apart, axis=1)[:, :k]
    near, apart = np.take_along_axis(near, order, 1), np.take_along_axis(apart, order, 1)
    scale = torch.from_numpy(apart[:, -1]).median().item()
    weights = np.zeros((len(z), len(z)))
    np.put_along_axis(weights, near, np.exp(-power * apart / (2 * scale)), 1)
    weights += weights.T
    degree = weights.sum(1)
    return weights / np.sqrt(np.outer(degree, degree))


def graph(z):
    return joined(*nearest_others(z, "cosine", 3), z, "cosine", 2.0).to_dense()


@pytest.mark.parametrize("beside", ["latents", "samples"])
def test_the_graphs_are_the_second_look_and_its_mean_with_another(beside):
    z, x = torch.randn(N, K, generator=torch.Generator().manual_seed(2)), images()
    z = z - z.mean(0)
    made = head(k=3, power=2.0, candidates=7, window=1, beside=beside).graphs(z, Setting("cosine", 3, 0.9), x.flatten(1))
    again = by_hand(z, x, 3, 2.0, 7, 1)
    np.testing.assert_allclose(made.narrow.to_dense(), again, atol=1e-5)
    if beside == "latents":
        other = graph(z)
    else:  # principal components, by another road: right singular vectors
        flat = (x.flatten(1) - x.flatten(1).mean(0)).double()
        u, s, _ = torch.linalg.svd(flat, full_matrices=False)
        other = graph((u * s)[:, :K].float())
    np.testing.assert_allclose(made.wide.to_dense(), (again + other.numpy()) / 2, atol=1e-5)


def moving_bars():
    """Images of bars that lie or stand, each at a place of its own, and latents that know nothing of them."""
    random = np.random.default_rng(0)
    y = np.arange(211) % 2
    x = np.zeros((211, 1, 11, 11), np.float32)
    for row, upright in enumerate(y):
        top, left = random.integers(2, 9), random.integers(2, 9)
        x[(row, 0, slice(2, 9), left) if upright else (row, 0, top, slice(2, 9))] = 1
    return torch.from_numpy(x), torch.from_numpy(y), torch.randn(211, K, generator=torch.Generator().manual_seed(3))


def test_a_second_look_joins_what_the_latents_do_not():
    """Latents of noise: labels spread over their graph guess, and over that of the likest of 100 candidates they know."""
    x, truth, z = moving_bars()
    y = truth.where(torch.arange(211) < 22, -1)
    shapes = Shapes(x=(1, 11, 11), latent=K, classes=2, targets=None)
    blind = LabelSpreading(LabelSpreading.Config(), shapes)
    blind.fit(z, y)
    looking = ImageLabelSpreading(ImageLabelSpreading.Config(candidates=100, sharpen=5), shapes)
    looking.fit(z, y, x.flatten(1))
    unseen = y < 0
    assert (blind.p.argmax(1) == truth)[unseen].float().mean() < 0.75
    assert (looking.p.argmax(1) == truth)[unseen].float().mean() > 0.95


def test_predictions_are_label_spreadings():
    """They ask the latents alone: the vote of the nearest with this head's probabilities."""
    x, truth, z = moving_bars()
    shapes = Shapes(x=(1, 11, 11), latent=K, classes=2, targets=None)
    looking = ImageLabelSpreading(ImageLabelSpreading.Config(), shapes)
    looking.fit(z, truth.where(torch.arange(211) < 22, -1), x.flatten(1))
    plain = LabelSpreading(LabelSpreading.Config(), shapes)
    plain.load_state_dict(looking.state_dict())
    new = torch.randn(13, K, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(looking.predict(new).probs, plain.predict(new).probs)


def test_the_window_goes_with_the_image():
    assert head((1, 28, 28))._window() == 2
    assert head((1, 28, 28), side=28)._window() == 2
    assert head((3, 56, 70), side=28)._window() == 4
    assert head((1, 8, 8), side=28)._window() == 1  # 0.57 of a pixel would be no look at all
    assert head((1, 8, 8), side=28, window=0)._window() == 0


@pytest.mark.parametrize(
    ("shape", "options", "complaint"),
    [
        ((13,), {}, "image_label_spreading needs images (C, H, W), but a sample has shape (13,). Take label_spreading."),
        ((1, 8, 8), {"k": 30}, "model.head.k = 30 of 20 candidates: raise model.head.candidates."),
    ],
)
def test_what_it_cannot_look_at(shape, options, complaint):
    recipe = type("Resolved", (), {"shapes": Shapes(x=shape, latent=K, classes=C, targets=None)})
    assert ImageLabelSpreading.check(ImageLabelSpreading.Config(**options), recipe) == [complaint]


def test_graphs_of_other_images_are_others(monkeypatch):
    """What a process remembers belongs to the latents and the images."""
    for name in ("GRAPHS", "NEAR"):
        monkeypatch.setattr(image_spreading, name, Memory(3))
    z, one, two = torch.randn(N, K), images(seed=5).flatten(1), images(seed=6).flatten(1)
    made, setting = head(k=3, candidates=7), Setting("cosine", 3, 0.9)
    first = made.graphs(z, setting, one)
    assert made.graphs(z.clone(), setting, one.clone()) is first
    assert not torch.equal(made.graphs(z, setting, two).narrow.to_dense(), first.narrow.to_dense())
    assert len(image_spreading.GRAPHS.held) == 2
    assert len(image_spreading.NEAR.held) == 3  # the latents' neighbours, and how alike those of either images are


def test_the_components_of_the_samples_are_found_once(monkeypatch):
    """Rounds change the latents, not the samples."""
    monkeypatch.setattr(image_spreading, "NEAR", Memory(4))
    made, times = head(k=3, candidates=7, beside="samples"), []
    monkeypatch.setattr(image_spreading, "principal", lambda *asked: times.append(1) or principal(*asked))
    x = images().flatten(1)
    for seed in range(5):
        z = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
        made.graphs(z, Setting("cosine", 3, 0.9), x)
    assert len(times) == 1


def test_a_graph_of_twins_is_finite():
    """Images that are all alike have no distance and no scale."""
    z, x = torch.randn(N, K), torch.ones(N, 70)
    made = head(k=3, candidates=7).graphs(z, Setting("cosine", 3, 0.9), x)
    assert torch.isfinite(made.narrow.to_dense()).all()
    ones = symmetric(torch.ones(N, 3), torch.stack([(torch.arange(N) + d) % N for d in (1, 2, 3)], 1)).to_dense()
    assert torch.isfinite(ones).all()


def test_what_is_held_out_is_judged_on_the_same_graphs():
    x, truth, z = moving_bars()
    y = truth.where(torch.arange(211) < 22, -1)
    looking = ImageLabelSpreading(
        ImageLabelSpreading.Config(candidates=100, sharpen=5), Shapes(x=(1, 11, 11), latent=K, classes=2, targets=None)
    )
    p = looking.held_out(z, y, torch.arange(22)[None] % 11, x.flatten(1))
    assert (p[0].argmax(1) == truth[:22]).float().mean() > 0.9
