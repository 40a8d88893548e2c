"""Corruptions: what they do to a sample, against other libraries and closed forms, and what a model learns from undoing them."""

import math

import numpy as np
import pytest
import torch
from engine_kit import feed_of, fresh, part, resolved, trainer_of
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from ssl_ae_builtins.distortion import Distortion, affine, displacements, modes, warp
from ssl_ae_builtins.grayscale import Grayscale
from ssl_ae_builtins.noise import SaltPepper

from ssl_ae import Batch, Shapes
from ssl_ae.errors import RecipeError

IMAGE, COLOUR = (1, 7, 5), (3, 7, 5)
STILL = {"rotation": 0, "translation": 0, "log_scale": 0, "shear": 0, "alpha": 0}


def built(cls, shape=IMAGE, **options):
    return part(cls, options=options).build(Shapes(x=shape, latent=5, classes=3))


def images(count, *shape, seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- all of them


NOISES = [({"name": "salt_pepper"}, (7,)), ({"name": "salt_pepper"}, IMAGE), ({"name": "distortion"}, IMAGE)]


@pytest.mark.parametrize(("noise", "shape"), NOISES, ids=str)
def test_noise_acts_in_training_alone_and_the_target_stays_clean(noise, shape):
    model = fresh(resolved(shape, model={"regularizers": [noise]}))
    x = images(13, *shape)
    trained = model(Batch(x=x))
    assert torch.equal(trained.batch.target, x)
    assert not torch.equal(trained.taps["input"], x)
    judged = model.eval()(Batch(x=x))
    assert torch.equal(judged.taps["input"], x)
    assert torch.equal(model.features(x), judged.q.mean)


@pytest.mark.parametrize(("noise", "shape"), NOISES, ids=str)
def test_noise_is_fresh_at_every_step(noise, shape):
    optimizer = {"name": "sgd", "lr": 1e-300}
    found = resolved(shape, model={"regularizers": [noise]}, pretrain={"optimizer": optimizer, "batch_size": 13, "epochs": 3})
    x = images(13, *shape)
    trainer, seen = trainer_of(found, "pretrain", feed_of(x.numpy())), []
    trainer.model.decoder.register_forward_hook(lambda module, given, out: seen.append(given[1].taps["input"].detach()))
    for step in (0, 1, 2, 1):
        trainer.progress.step = step
        trainer.make_step(trainer.runs[0], [Batch(x=x)])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[3], seen[1])  # and it is the step's own


# --- salt and pepper


def test_salt_and_pepper_take_half_the_fraction_each():
    """Of n numbers, f/2 become low and f/2 high, with sd sqrt(f/2 (1 - f/2) / n); within 5 of them. The rest stays."""
    torch.manual_seed(0)
    fraction, n = 0.3, 200_003
    x = 0.25 + 0.5 * torch.rand(1, n)
    noisy = built(SaltPepper, fraction=fraction, low=-2.0, high=3.0).perturb(x, "input")
    margin = 5 * (fraction / 2 * (1 - fraction / 2) / n) ** 0.5
    for end in (-2.0, 3.0):
        assert abs(float((noisy == end).float().mean()) - fraction / 2) < margin
    kept = (noisy != -2.0) & (noisy != 3.0)
    assert torch.equal(noisy[kept], x[kept])


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_salt_and_pepper_of_none_and_of_all(fraction):
    x = 0.25 + 0.5 * torch.rand(11, 13)
    noisy = built(SaltPepper, fraction=fraction).perturb(x, "input")
    assert torch.equal(noisy, x) if fraction == 0 else set(noisy.unique().tolist()) == {0.0, 1.0}


def salt_pepper(scale, x_range=None, **options):
    """The complaint about a recipe with it, or None."""
    try:
        resolved(data={"path": "nowhere", "scale": scale}, model={"regularizers": [{"name": "salt_pepper", **options}]})
    except RecipeError as error:
        return str(error)


def test_salt_and_pepper_must_be_the_ends_of_the_range():
    assert salt_pepper("none") is None  # the kit's card says [0, 1]
    assert salt_pepper("none", low=0.25, high=0.75) is None
    assert "salt_pepper.high = 16: samples lie in [0, 1]. Set high: 1" in salt_pepper("none", high=16)
    assert "salt_pepper.low = 1 is not below high = 1" in salt_pepper("none", low=1)
    standard = salt_pepper("standard", low=-2)
    assert "salt_pepper.high: data.scale = standard leaves samples without a highest number. Set high" in standard
    assert "salt_pepper.low" not in standard
    assert salt_pepper("standard", low=-2, high=2) is None
    assert salt_pepper("standard", layers=["h1"]) is None


# --- distortion: where a pixel goes


def still(count):
    zero = torch.zeros(count, dtype=torch.float64)
    return affine(zero, zero, torch.zeros(count, 2, dtype=torch.float64))


def shift_of(count, right, down):
    return torch.tensor([[right, down]], dtype=torch.float64).expand(count, 2)


def turned(degrees, count=2):
    zero = torch.zeros(count, dtype=torch.float64)
    return affine(zero + math.radians(degrees), zero, torch.zeros(count, 2, dtype=torch.float64))


@pytest.mark.parametrize("shape", [IMAGE, (2, 8, 11), (3, 1, 4)])
def test_distortion_of_no_strength_is_the_identity(shape):
    x = images(3, *shape)
    torch.testing.assert_close(built(Distortion, shape, **STILL).perturb(x, "input"), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, -3), (-1, 2)])
def test_a_translation_by_whole_pixels_is_a_shifted_image(right, down):
    x = images(2, 3, 7, 5)
    expected = torch.zeros_like(x)
    expected[..., max(down, 0) : 7 + min(down, 0), max(right, 0) : 5 + min(right, 0)] = x[
        ..., max(-down, 0) : 7 - max(down, 0), max(-right, 0) : 5 - max(right, 0)
    ]
    torch.testing.assert_close(warp(x, still(2), shift_of(2, right, down)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [6, 7])
def test_a_quarter_turn_is_rot90(side):
    x = images(2, 3, side, side)
    torch.testing.assert_close(warp(x, turned(90), shift_of(2, 0, 0)), x.rot90(1, (2, 3)), rtol=0, atol=1e-12)


def test_a_turn_of_an_image_that_is_not_square_keeps_pixels_square():
    x = images(2, 3, 7, 5)
    middle = warp(x, turned(90), shift_of(2, 0, 0))[..., 1:6, :]
    torch.testing.assert_close(middle, x[..., 1:6, :].rot90(1, (2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(warp(x, turned(180), shift_of(2, 0, 0)), x.flip(2, 3), rtol=0, atol=1e-12)


def test_scale_and_shear_by_hand():
    """Threefold about the centre (3, 2) of 7 x 5: what was one pixel away is three away. 45 degrees: row y moves by y - 3."""
    x, zero = images(1, 1, 7, 5), torch.zeros(1, dtype=torch.float64)
    grown = warp(x, affine(zero, zero, torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)), shift_of(1, 0, 0))
    torch.testing.assert_close(grown[..., 0::3, :], x[..., 2:5, :], rtol=0, atol=1e-12)
    leaning = warp(x, affine(zero, zero + math.pi / 4, torch.zeros(1, 2, dtype=torch.float64)), shift_of(1, 0, 0))
    for row in range(7):
        kept = [column for column in range(5) if 0 <= column + row - 3 < 5]
        expected = x[0, 0, row, kept]
        torch.testing.assert_close(leaning[0, 0, row, [c + row - 3 for c in kept]], expected, rtol=0, atol=1e-12)


# scipy 1.17's names for what lies outside
@pytest.mark.parametrize(("border", "mode"), [("zeros", "grid-constant"), ("border", "nearest"), ("reflection", "reflect")])
def test_any_map_against_scipy(border, mode):
    """map_coordinates at A^-1 (p - t) + d(p), every row with its own A, t and d."""
    count, height, width = 3, 7, 11
    x, random = images(count, 2, height, width), np.random.default_rng(0)
    angle, shear = torch.from_numpy(random.uniform(-1, 1, (2, count)))
    linear = affine(angle, shear, torch.from_numpy(random.uniform(-0.5, 0.5, (count, 2))))
    shift, bend = (
        torch.from_numpy(random.normal(size=(count, 2))),
        torch.from_numpy(random.normal(size=(count, 2, height, width))),
    )
    found = warp(x, linear, shift, bend, border)
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1) - centre  # (H, W, 2), x before y
    for n in range(count):
        at = (places - shift[n].numpy()) @ np.linalg.inv(linear[n].numpy()).T + bend[n].permute(1, 2, 0).numpy() + centre
        for channel in range(2):
            expected = ndimage.map_coordinates(x[n, channel].numpy(), at[..., ::-1].transpose(2, 0, 1), order=1, mode=mode)
            np.testing.assert_allclose(found[n, channel], expected, rtol=0, atol=1e-10)


# --- distortion: what is drawn


def blob(height=31, width=29, right=0.0, down=0.0):
    """(1, H, W): a round Gaussian of 2 pixels, so many pixels from the centre."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    return torch.exp(-((x - right) ** 2 + (y - down) ** 2) / 8)[None]


def centroids(x):
    """(B, 2): x before y, in pixels from the centre."""
    height, width = x.shape[2:]
    weight = x[:, 0] / x[:, 0].sum((1, 2), keepdim=True)
    right, down = torch.arange(width) - (width - 1) / 2, torch.arange(height) - (height - 1) / 2
    return torch.stack([weight.sum(1) @ right, weight.sum(2) @ down], dim=1)


def perturbed(x, count, **strength):
    torch.manual_seed(0)
    return built(Distortion, tuple(x.shape), **{**STILL, **strength}).perturb(x.expand(count, *x.shape), "input")


def test_translations_are_uniform_and_the_axes_independent():
    """Uniform on [-3, 3]: variance 3, with relative sd sqrt(0.8 / n); within 5 of them. Correlation 0 with sd 1 / sqrt(n)."""
    n = 5003
    places = centroids(perturbed(blob(), n, translation=3))
    assert places.abs().max() < 3.01
    np.testing.assert_allclose(places.var(0) / 3, 1, atol=5 * (0.8 / n) ** 0.5)
    assert abs(float(places.T.corrcoef()[0, 1])) < 5 / n**0.5


def test_rotations_are_uniform():
    """Of a blob 6 pixels to the right of the centre: radius kept, angle uniform on [-40, 40] degrees, of variance 40^2 / 3."""
    n = 5003
    places = centroids(perturbed(blob(right=6.0), n, rotation=40))
    torch.testing.assert_close(places.norm(dim=1), torch.full((n,), 6.0), rtol=0, atol=0.02)
    angle = torch.atan2(-places[:, 1], places[:, 0]).rad2deg()
    assert angle.abs().max() < 40.2
    assert abs(float(angle.var()) / (40**2 / 3) - 1) < 5 * (0.8 / n) ** 0.5


def test_scales_of_height_and_width_are_drawn_apart():
    """Of a blob at (5, 5): each coordinate times exp(u), u uniform on [-0.2, 0.2], of variance 0.2^2 / 3; uncorrelated."""
    n = 5003
    logs = (centroids(perturbed(blob(right=5.0, down=5.0), n, log_scale=0.2)) / 5).log()
    assert logs.abs().max() < 0.202
    np.testing.assert_allclose(logs.var(0) / (0.2**2 / 3), 1, atol=5 * (0.8 / n) ** 0.5)
    assert abs(float(logs.T.corrcoef()[0, 1])) < 5 / n**0.5


def test_displacements_have_the_spread_and_the_reach_of_the_formula():
    """sd alpha / (2 sqrt(3 pi) sigma) at every pixel, corners too; correlated by exp(-r^2 / 4 sigma^2) over r pixels."""
    torch.manual_seed(0)
    n, alpha, sigma = 4001, 5.0, 2.0
    field = displacements(torch.zeros(n, 3, 11, 7), alpha, modes(11, sigma), modes(7, sigma))
    assert field.shape == (n, 2, 11, 7)
    expected = alpha / (2 * math.sqrt(3 * math.pi) * sigma)
    near = 6 * (0.5 / n) ** 0.5  # relative sd of a sample's sd; 154 of them are looked at
    np.testing.assert_allclose(field.std(0) / expected, 1, atol=near)
    np.testing.assert_allclose(field.mean(0) / expected, 0, atol=6 / n**0.5)
    middle = field[:, 0, 5, 3]
    for (y, x), distance in {(5, 5): 2, (8, 3): 3, (9, 6): 5}.items():
        found = float(torch.corrcoef(torch.stack([middle, field[:, 0, y, x]]))[0, 1])
        assert abs(found - math.exp(-(distance**2) / (4 * sigma**2))) < 5 / n**0.5
    assert abs(float(torch.corrcoef(torch.stack([middle, field[:, 1, 5, 3]]))[0, 1])) < 5 / n**0.5  # x apart from y


@pytest.mark.parametrize(("size", "sigma"), [(28, 4.0), (11, 1.5), (7, 0.3), (5, 40.0)])
def test_modes_carry_the_covariance_of_scipy_s_smoothed_noise(size, sigma):
    """gaussian_filter1d of unit impulses is the matrix S of the smoothing; M M' = S S' up to 1e-4 of a pixel's variance.

    What is missing is what the left-out modes add: positive, so at most their mean of the two pixels' variances.
    """
    reach = math.ceil(4 * sigma)
    impulses = np.eye(size + 4 * reach)  # wide enough for what lies outside not to matter
    smoothed = ndimage.gaussian_filter1d(impulses, sigma, axis=0, mode="constant", radius=reach)[2 * reach : 2 * reach + size]
    expected, found = smoothed @ smoothed.T, modes(size, sigma)
    np.testing.assert_allclose((found @ found.mT).numpy(), expected, rtol=0, atol=1.0001e-4 * expected.max())
    fewer = 1 - found[:, :-1].square().sum(1).numpy() / expected.diagonal()
    assert fewer.max() > 1e-4  # and each of them is needed


def test_displacements_apply_the_modes_of_each_axis_to_normal_noise():
    alpha, down, across = 3.0, modes(11, 1.5), modes(7, 1.5)
    x = torch.zeros(2, 1, 11, 7, dtype=torch.float64)
    torch.manual_seed(1)
    field = displacements(x, alpha, down, across)
    torch.manual_seed(1)
    noise = torch.randn(2, 2, down.shape[1], across.shape[1], dtype=torch.float64)
    expected = np.einsum("hr,nars,ws->nahw", down, noise, across) * alpha / math.sqrt(3)  # U(-1, 1) has variance 1/3
    np.testing.assert_allclose(field, expected, rtol=0, atol=1e-12)


def test_with_side_the_distortion_is_relative_to_the_image():
    """As a picture of twice the size: shifts and displacements are twice as many pixels, and smooth over twice as many."""
    options = {"rotation": 0, "log_scale": 0, "shear": 0, "translation": 3, "alpha": 20, "sigma": 2, "side": 11}
    shifts, spreads, reaches = [], [], []
    for side in (11, 22):
        distortion = Distortion(Distortion.Config(**options), Shapes((1, side, side), 5))
        torch.manual_seed(0)
        shifts.append(distortion._affine(torch.zeros(4001, 1, side, side))[1].abs().amax().item())
        bend = distortion._bend(torch.zeros(4001, 1, side, side))
        spreads.append(bend.std().item())
        step = side // 11  # the same places of the picture
        reaches.append(
            (bend[:, :, 4 * step, 4 * step] * bend[:, :, 4 * step, 6 * step]).mean().item() / bend.square().mean().item()
        )
    assert shifts[1] / shifts[0] == pytest.approx(2, rel=1e-6)  # the same draws
    assert spreads[1] / spreads[0] == pytest.approx(2, rel=0.02)  # alpha / sigma, times a constant: 4 / 2
    assert reaches[1] == pytest.approx(reaches[0], abs=0.02)


def test_distortion_of_a_layer_is_of_that_layer_s_size():
    """Feature maps are smaller than the sample; the field is made for them."""
    distortion, h = built(Distortion, **{**STILL, "alpha": 5.0, "sigma": 1.0}), images(3, 2, 4, 3)
    torch.manual_seed(5)
    found = distortion.perturb(h, "h1")
    torch.manual_seed(5)
    torch.empty(6, 3, dtype=torch.float64).uniform_()  # the numbers of the affine part
    bend = displacements(h, 5.0, modes(4, 1.0), modes(3, 1.0))
    torch.testing.assert_close(found, warp(h, still(3), shift_of(3, 0, 0), bend), rtol=0, atol=1e-12)


def test_every_row_has_a_distortion_of_its_own_that_no_other_row_changes():
    distortion, x = built(Distortion), images(1, *IMAGE).expand(5, *IMAGE)
    torch.manual_seed(2)
    together = distortion.perturb(x, "input")
    for i in range(5):
        for j in range(i):
            assert not torch.allclose(together[i], together[j], atol=1e-3)
    others = torch.cat([images(4, *IMAGE, seed=1), x[4:]])
    torch.manual_seed(2)
    torch.testing.assert_close(distortion.perturb(others, "input")[4], together[4], rtol=0, atol=0)


def test_distortion_is_computed_in_float32_under_autocast():
    distortion, x = built(Distortion), images(5, *IMAGE).float()
    torch.manual_seed(3)
    plain = distortion.perturb(x, "input")
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distortion.perturb(x, "input"), plain)


@pytest.mark.parametrize("entry", [{"name": "distortion"}, {"name": "grayscale"}], ids=lambda entry: entry["name"])
@pytest.mark.parametrize("shape", [(7,), (2, 13)])
def test_what_is_no_image_is_refused(entry, shape):
    with pytest.raises(RecipeError, match=rf"{entry['name']} needs .*, but a sample has shape .* Remove {entry['name']}\."):
        resolved(shape, model={"regularizers": [entry]})


def test_a_layer_that_is_no_image_is_refused():
    for name, shape in (("distortion", IMAGE), ("grayscale", COLOUR)):
        model = fresh(resolved(shape, model={"regularizers": [{"name": name, "layers": ["h1"]}]}))
        with pytest.raises(RecipeError, match=rf"{name}\.layers: layer 'h1' has shape \(11,\) a row"):
            model(Batch(x=images(2, *shape)))


# --- grayscale


def test_grey_is_pillow_s_luma_in_three_equal_channels():
    """Pillow 12 converts RGB to L by ITU-R 601-2's luma, rounded to whole numbers."""
    x = torch.randint(256, (1, 3, 7, 5), generator=torch.Generator().manual_seed(0)).double()
    grey = built(Grayscale, COLOUR).perturb(x, "input")
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert torch.equal(grey[:, 0], grey[:, 2])
    pillow = np.asarray(Image.fromarray(x[0].permute(1, 2, 0).numpy().astype(np.uint8)).convert("L"), float)
    assert np.abs(grey[0, 0].numpy() - pillow).max() < 0.51
    torch.testing.assert_close(built(Grayscale, COLOUR).perturb(grey, "input"), grey, rtol=1e-12, atol=0)  # grey stays grey


def test_grayscale_acts_in_evaluation_and_the_target_keeps_its_colours():
    found = resolved(COLOUR, model={"regularizers": [{"name": "grayscale"}]})
    model, plain = fresh(found), fresh(resolved(COLOUR)).eval()
    x = images(13, *COLOUR)
    grey = built(Grayscale, COLOUR).perturb(x, "input")
    for training in (True, False):
        trace = model.train(training)(Batch(x=x))
        assert torch.equal(trace.batch.target, x)
        assert torch.equal(trace.taps["input"], grey)
    assert torch.equal(model.features(x), plain.features(grey))
    assert not torch.equal(model.features(x), plain.features(x))


# --- what is learnt


@pytest.mark.parametrize("latent", [5, 3])
def test_a_linear_denoising_autoencoder_is_ridge_regression(latent):
    """Bishop 1995, sec. 2: E|x - A(x + s eps) - b|^2 = |x - A x - b|^2 + s^2 |A|_F^2, so N rows make a ridge of penalty N s^2.

    Its solution has the eigenvectors u of the covariance, A = sum l / (l + s^2) u u'; of rank K at most, the K largest of them.
    Noise leaves 0.6 % of A after 300 steps on 1,009 rows with a decaying learning rate; 2 % are allowed. Without the noise, A
    would be 51 % (K = 5) or 28 % (K = 3) away.
    """
    count, size, scale = 1009, 5, 0.7
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(size, size)))[0]
    x = random.normal(size=(count, size)) * np.sqrt([3.0, 2.0, 1.2, 0.7, 0.4]) @ basis.T + random.normal(size=size)
    linear = {"encoder": {"name": "linear"}, "decoder": {"name": "linear"}, "latent_dim": latent}
    found = resolved(
        (size,),
        model={**linear, "regularizers": [{"name": "gaussian_noise", "scale": scale}]},
        pretrain={
            "epochs": 300,
            "batch_size": count,
            "optimizer": {"name": "sgd", "lr": 0.03, "momentum": 0.9},
            "schedule": {"name": "cosine"},
        },
    )
    trainer = trainer_of(found, "pretrain", feed_of(x))
    trainer.run()
    with torch.no_grad():
        encoder, decoder = trainer.model.encoder.latent.linear, trainer.model.decoder.linear
        found_map = (decoder.weight @ encoder.weight).numpy()
        found_bias = (decoder.weight @ encoder.bias + decoder.bias).numpy()

    centred = x - x.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / count)
    values, vectors = values[::-1][:latent], vectors[:, ::-1][:, :latent]
    expected = vectors * (values / (values + scale**2)) @ vectors.T
    if latent == size:
        ridge = Ridge(alpha=count * scale**2).fit(x, x)
        np.testing.assert_allclose(expected, ridge.coef_, rtol=0, atol=1e-10)
        np.testing.assert_allclose(x.mean(0) - expected @ x.mean(0), ridge.intercept_, rtol=0, atol=1e-10)
    bias = x.mean(0) - expected @ x.mean(0)
    assert np.linalg.norm(found_map - expected) < 0.02 * np.linalg.norm(expected)
    assert np.linalg.norm(found_bias - bias) < 0.02 * np.linalg.norm(bias)
    without_noise = vectors @ vectors.T
    assert np.linalg.norm(without_noise - expected) > 0.25 * np.linalg.norm(expected)


@pytest.mark.parametrize("noise", [{"name": "salt_pepper", "fraction": 0.2}, {"name": "gaussian_noise", "scale": 0.3}], ids=str)
def test_digits_that_were_held_out_come_out_cleaner_than_they_went_in(noise):
    x = (load_digits().images[:, None] / 16).astype(np.float32)
    found = resolved(
        (1, 8, 8),
        model={"latent_dim": 32, "encoder": {"name": "mlp", "widths": [127]}, "regularizers": [noise]},
        pretrain={"epochs": 30, "batch_size": 128, "optimizer": {"name": "adam", "lr": 3e-3}, "schedule": {"name": "cosine"}},
    )
    trainer = trainer_of(found, "pretrain", feed_of(x[:1400], dtype=torch.float32), fresh(found, dtype=torch.float32))
    trainer.run()
    model, clean = trainer.model.eval(), torch.from_numpy(x[1400:])
    torch.manual_seed(0)
    noisy = model.regularizers[0].perturb(clean, "input")
    with torch.no_grad():
        cleaned = model.decode(model.features(noisy)).mean
    psnr = [10 * math.log10(1 / float((values - clean).square().mean())) for values in (noisy, cleaned)]
    assert psnr[1] > psnr[0] + 3  # decibels
