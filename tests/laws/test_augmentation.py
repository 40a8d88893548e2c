"""Crops, flips, swapped columns and mixed rows by hand and by what is drawn; and what a corruption is used for, on the engine."""

import math
from itertools import product
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from engine_kit import feed_of, fresh, part, resolved, rows, trainer_of
from scipy import stats
from ssl_ae_builtins.crop_flip import CropFlip
from ssl_ae_builtins.cutout import Cutout
from ssl_ae_builtins.mixup import Mixup, partners
from ssl_ae_builtins.noise import ColumnSwap

import ssl_ae
from ssl_ae import Batch, Need, Shapes
from ssl_ae.data.card import Y as Labels
from ssl_ae.errors import RecipeError
from ssl_ae.objective import supervised

IMAGE, VECTOR = (2, 7, 5), (7,)


def built(cls, shape, **options):
    return part(cls, options=options).build(Shapes(x=shape, latent=5, classes=3))


def images(count, *shape, seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- crop and flip


@pytest.mark.parametrize(("border", "mode"), [("zeros", "constant"), ("border", "edge"), ("reflection", "symmetric")])
def test_a_crop_is_one_of_numpy_s_padded_windows(border, mode):
    """Every row is one of the (2 p + 1)^2 windows of np.pad, mirrored or not; of 3,000 rows every one occurs."""
    padding, x = 2, images(1, *IMAGE)
    torch.manual_seed(0)
    found = built(CropFlip, IMAGE, padding=padding, border=border).perturb(x.expand(3000, *IMAGE), "input").numpy()
    windows = {}
    for mirrored in (False, True):
        image = x[0].numpy()[..., ::-1] if mirrored else x[0].numpy()
        wide = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode=mode)
        for down, right in product(range(5), range(5)):
            windows[mirrored, down, right] = wide[:, down : down + 7, right : right + 5].tobytes()
    counts = dict.fromkeys(windows.values(), 0)
    assert len(counts) == 50
    for row in found:
        counts[np.ascontiguousarray(row).tobytes()] += 1
    # each has odds 1/50: chi-square of 49 degrees of freedom
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_odds_of_a_flip():
    x = images(1, *IMAGE).expand(13, *IMAGE)
    assert torch.equal(built(CropFlip, IMAGE, padding=0, flip=1.0).perturb(x, "input"), x.flip(3))
    assert torch.equal(built(CropFlip, IMAGE, padding=1, flip=0.0, border="border").perturb(0 * x + 1, "input"), 0 * x + 1)


@pytest.mark.parametrize(
    ("options", "shape", "complaint"),
    [
        ({}, VECTOR, r"crop_flip needs images \(C, H, W\), but a sample has shape \(7,\)\. Remove crop_flip"),
        ({"padding": 5}, IMAGE, r"padding = 5: an image of 7 x 5 could be shifted out of sight\. Set less than 5"),
        ({"padding": 0, "flip": 0}, IMAGE, r"with padding = 0 and flip = 0 it changes nothing"),
        ({"padding": 1.5}, IMAGE, r"padding = 1\.5: expected a valid integer"),
    ],
)
def test_crops_that_make_no_sense_are_refused(options, shape, complaint):
    with pytest.raises(RecipeError, match=complaint):
        resolved(shape, model={"regularizers": [{"name": "crop_flip", **options}]})


# --- cutout


def test_what_is_hidden_is_a_square_around_any_pixel():
    """0.4 of 7 x 5 pixels is 3 x 2: a block that the edge cuts, around each of the 35 pixels equally often."""
    x = images(1, *IMAGE) + 1
    torch.manual_seed(0)
    found = built(Cutout, IMAGE, side=0.4).perturb(x.expand(3500, *IMAGE), "input")
    assert torch.equal(found.where(found != 0, x), x.expand_as(found))
    hidden = found == 0
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))  # all channels alike
    counts = dict.fromkeys(product(range(7), range(5)), 0)
    blocks = {}
    for row, column in counts:
        block = np.zeros((7, 5), bool)
        block[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 1] = True
        blocks[block.tobytes()] = row, column
    assert len(blocks) == 35
    for row in hidden[:, 0].numpy():
        counts[blocks[np.ascontiguousarray(row).tobytes()]] += 1
    # each has odds 1/35: chi-square of 34 degrees of freedom
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_vectors_have_no_squares():
    with pytest.raises(RecipeError, match=r"cutout needs images \(C, H, W\), but a sample has shape \(7,\)\. Remove cutout"):
        resolved(VECTOR, model={"regularizers": [{"name": "cutout"}]})


# --- column swap


def test_swapped_numbers_are_of_another_row_and_the_same_column():
    """Column j holds j + row / 1000; of n numbers a fraction f changes, with sd sqrt(f (1 - f) / n); within 5 of them."""
    count, columns, fraction = 503, 101, 0.3
    x = torch.arange(columns)[None] + torch.arange(count)[:, None] / 1000
    torch.manual_seed(0)
    found = built(ColumnSwap, (columns,), fraction=fraction).perturb(x, "input")
    assert torch.equal(found.floor(), x.floor())
    changed = found != x
    assert abs(float(changed.double().mean()) - fraction) < 5 * (fraction * (1 - fraction) / changed.numel()) ** 0.5
    donors = ((found - found.floor()) * 1000).round()
    distance = (donors - torch.arange(count)[:, None])[changed] % count  # never 0, and uniform over the other rows
    assert stats.chisquare(np.bincount(distance.int().numpy(), minlength=count)[1:]).pvalue > 1e-4
    assert all(len(set(row[mask].tolist())) > 10 for row, mask in zip(donors, changed, strict=True))  # each number its own donor


def test_a_row_alone_keeps_its_numbers():
    x = torch.rand(1, 7)
    assert torch.equal(built(ColumnSwap, VECTOR, fraction=1.0).perturb(x, "input"), x)
    pair = torch.rand(2, 7)
    assert torch.equal(built(ColumnSwap, VECTOR, fraction=1.0).perturb(pair, "input"), pair.flip(0))


def test_what_has_no_columns_is_refused():
    with pytest.raises(RecipeError, match=r"column_swap needs columns .* a sample has shape \(2, 7, 5\)"):
        resolved(IMAGE, model={"regularizers": [{"name": "column_swap"}]})


# --- mixup


def mixed(batch, seed=0, alpha=1.0, cls=Mixup):
    return built(cls, VECTOR, alpha=alpha).transform(batch, torch.Generator().manual_seed(seed))


def one_row_a_coordinate(labeled):
    """x is the identity, so a mixed row shows its two parents and their shares."""
    count = len(labeled)
    y = torch.where(torch.tensor(labeled), torch.arange(count) % 3, -1)
    return Batch(x=torch.eye(count, dtype=torch.float64), y=y)


LABELED = [i % 3 == 0 for i in range(23)]


def test_each_row_mixes_with_one_of_its_kind_and_its_label_alike():
    batch = one_row_a_coordinate(LABELED)
    after = mixed(batch)
    share = after.x.diagonal()
    labeled = batch.labeled
    assert torch.allclose(after.x.sum(1), torch.ones(23, dtype=torch.float64))
    for i in range(23):
        (partner,) = [j for j in torch.nonzero(after.x[i])[:, 0].tolist() if j != i]
        assert labeled[partner] == labeled[i]
        expected = torch.zeros(3, dtype=torch.float64)
        if labeled[i]:
            expected[batch.y[i]] += share[i]
            expected[batch.y[partner]] += 1 - share[i]
        torch.testing.assert_close(after.soft[i], expected)
    assert torch.equal(after.target, after.x)
    assert len(set(share.tolist())) == 23  # each row draws its own


def test_l_y_of_mixed_rows_is_the_mixture_of_cross_entropies():
    """lambda CE(y_i) + (1 - lambda) CE(y_j), each by torch's cross_entropy."""
    batch = one_row_a_coordinate(LABELED)
    after = mixed(batch)
    logits = torch.randn(23, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    value = supervised(SimpleNamespace(batch=after, p_y=torch.distributions.Categorical(logits=logits)))
    for i in torch.nonzero(batch.labeled)[:, 0].tolist():
        expected = sum(
            float(after.x[i, j]) * torch.nn.functional.cross_entropy(logits[i], batch.y[j])
            for j in torch.nonzero(after.x[i])[:, 0].tolist()
        )
        torch.testing.assert_close(value[i], expected)


def test_shares_follow_beta_and_partners_are_uniform():
    """Kolmogorov-Smirnov against scipy's beta; each other row of the kind is the partner equally often."""
    alpha, seeds = 0.4, 300
    shares, pairs = [], np.zeros((11, 11))
    for seed in range(seeds):
        after = mixed(one_row_a_coordinate([i < 4 for i in range(11)]), seed, alpha)
        shares += after.x.diagonal().tolist()
        pairs += (after.x > 0).numpy()
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-4
    np.fill_diagonal(pairs, 0)
    assert pairs[:4, 4:].sum() == pairs[4:, :4].sum() == 0
    for kind in (slice(0, 4), slice(4, 11)):
        counts = pairs[kind, kind][~np.eye(kind.stop - kind.start, dtype=bool)]
        assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("labeled", [[True], [False], [True, False, False], [True] * 3, [False] * 3])
def test_partners_are_a_permutation_of_each_kind(labeled):
    mask = torch.tensor(labeled)
    found = partners(mask, torch.Generator().manual_seed(0))
    assert sorted(found.tolist()) == list(range(len(labeled)))
    assert torch.equal(mask[found], mask)
    for i, j in enumerate(found.tolist()):
        assert (i == j) == (labeled.count(labeled[i]) == 1)


def test_guesses_and_soft_labels_mix_and_a_clean_target_stays_clean():
    batch = one_row_a_coordinate(LABELED)
    guess, soft = (torch.rand(23, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    noisy = Batch(x=batch.x, y=batch.y, target=2 * batch.x, guess=guess, soft=soft)
    after = mixed(noisy)
    torch.testing.assert_close(after.target, 2 * after.x)
    torch.testing.assert_close(after.guess, after.x @ guess)  # x is the matrix of shares
    torch.testing.assert_close(after.soft, after.x @ soft)


def test_mixup_trains_in_every_mode_and_is_of_classes():
    x, y = rows(29, labeled=0.4)
    for mode in ("pretrain", "joint", "alternate", "end-to-end"):
        trainer_of(resolved(model={"regularizers": [{"name": "mixup"}]}), mode, feed_of(x, y)).run()
    with pytest.raises(RecipeError, match=r"mixup mixes probabilities of classes, but labels of kit are of kind regression"):
        resolved(
            y=Labels(task="regression", names=("u", "v")),
            model={"head": {"name": "gaussian"}, "regularizers": [{"name": "mixup"}]},
        )


# --- what a corruption is used for

CORRUPTIONS = [
    ({"name": "gaussian_noise"}, VECTOR),
    ({"name": "masking_noise"}, VECTOR),
    ({"name": "column_swap", "fraction": 0.5}, VECTOR),
    ({"name": "distortion"}, IMAGE),
    ({"name": "crop_flip", "padding": 2}, IMAGE),
    ({"name": "cutout"}, IMAGE),
]


class Views(ssl_ae.Regularizer):
    """Squared distance between the predictions of two views (Laine & Aila 2017, the Pi model); keeps the traces it was given."""

    name = "views"
    needs = frozenset({Need.VIEW, Need.PREDICTION})
    seen: ClassVar[list] = []

    def penalty(self, trace):
        self.seen.append(trace)
        return (trace.p_y.probs - trace.view.p_y.probs).square().sum(1)


@pytest.mark.parametrize(("corruption", "shape"), CORRUPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["pretrain", "joint", "end-to-end"])
def test_one_corruption_serves_the_autoencoder_the_labelled_rows_and_both_views(mode, corruption, shape):
    """(a) l_X of the disturbed row is with the clean one; (b) labelled rows are disturbed too; (c) two views are two draws."""
    x, y = rows(29, shape, labeled=0.4)
    found = resolved(shape, model={"regularizers": [corruption]}, extra=[(Views,)])
    trainer = trainer_of(found, mode, feed_of(x, y))
    seen = []
    trainer.model.encoder.register_forward_hook(lambda module, given, out: seen.append(given[1].taps["input"].detach().clone()))
    Views.seen.clear()
    batch = Batch(x=torch.from_numpy(x), y=torch.from_numpy(y))
    trainer.make_step(trainer.runs[0], [batch])
    disturbed = (seen[0] != batch.x).flatten(1).any(1)
    assert disturbed[batch.labeled].float().mean() > 0.8
    assert disturbed[~batch.labeled].float().mean() > 0.8
    if mode == "pretrain":
        judge = fresh(found)
        with torch.no_grad():
            misses = judge.decode(judge.eval().features(seen[0])).mean - batch.x
        # -log N(x; x^, I), by hand; shares are kept in float32
        expected = 0.5 * (misses.flatten(1).square() + math.log(2 * math.pi)).sum(1).mean()
        share = trainer.runs[0].shares[trainer.runs[0].terms.index("reconstruction")]
        assert float(share) == pytest.approx(float(expected), rel=1e-5)
        return
    (trace,) = Views.seen
    assert torch.equal(trace.view.batch.x, batch.x)
    assert torch.equal(seen[1], trace.view.taps["input"])
    both = (seen[1] != seen[0]).flatten(1).any(1)
    assert both.float().mean() > 0.8  # another draw, not the same one again
    assert float(trainer.runs[0].shares[trainer.runs[0].terms.index("views")]) > 0
