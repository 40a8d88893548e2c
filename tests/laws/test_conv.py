"""Convolutions: sizes that are primes, images that are not square, and what a shift of the input does to a feature map."""

import numpy as np
import pytest
import torch
from engine_kit import CONSTANT, feed_of, fresh, resolved, rows, trainer_of
from ssl_ae_builtins.conv import ConvDecoder, ConvEncoder, grids
from torch.nn import functional as F

from ssl_ae import Pass, Shapes

LATENT = 5
SHAPES = [(1, 7, 11), (3, 13, 5), (2, 8, 17), (3, 1, 2), (2, 19), (5, 3), (1, 31, 31)]
ids = {"ids": lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value)}


def pair(shape, **options):
    """Encoder and decoder as a recipe makes them, with random biases."""
    torch.manual_seed(0)
    shapes = Shapes(x=shape, latent=LATENT)
    theirs = ConvEncoder.Config(**options)
    ours = ConvDecoder.mirrored(ConvDecoder.Config(), theirs)
    return ConvEncoder(theirs, shapes).double(), ConvDecoder(ours, shapes).double()


def walk(shape, **options):
    """A pass over 2 rows: what the decoder gives and every layer on the way."""
    encoder, decoder = pair(shape, **options)
    run = Pass()
    q = encoder(torch.rand(2, *shape, dtype=torch.float64), run)
    return q, decoder(q.mean, run)[0], run.taps


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, **ids)
def test_shapes_of_every_layer(shape, kernel):
    """Each layer halves each side and rounds up; the decoder goes back through the very same sizes to the sample's own."""
    q, p, taps = walk(shape, channels=(3, 7), kernel=kernel)
    sides, halves = shape[1:], [tuple(-(-n // 2) for n in shape[1:]), tuple(-(-n // 4) for n in shape[1:])]
    assert grids(shape, 2) == [sides, *halves]
    found = {name: tuple(h.shape[1:]) for name, h in taps.items()}
    assert found == {"h1": (3, *halves[0]), "h2": (7, *halves[1]), "d1": (7, *halves[1]), "d2": (3, *halves[0])}
    assert q.mean.shape == (2, LATENT)
    assert (p.batch_shape, p.event_shape, p.mean.shape) == ((2,), shape, (2, *shape))


def test_parameter_shapes_mirror():
    """Both hold their matrices as (channels towards the code, channels towards x, k, k)."""
    encoder, decoder = pair((3, 13, 11), channels=(5, 7), kernel=3)
    assert [tuple(block[0].weight.shape) for block in encoder.blocks] == [(5, 3, 3, 3), (7, 5, 3, 3)]
    assert [tuple(block[0].weight.shape) for block in decoder.blocks] == [(7, 5, 3, 3), (5, 3, 3, 3)]
    assert tuple(encoder.latent.linear.weight.shape) == tuple(reversed(decoder.linear.weight.shape)) == (LATENT, 7 * 4 * 3)


@pytest.mark.parametrize(("shape", "axis"), [((2, 23, 29), 2), ((2, 23, 29), 3), ((3, 47), 2)], **ids)
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_shift_of_the_input_moves_the_feature_maps(shape, axis, kernel):
    """By 4 = 2 * 2 pixels: map 1 moves by 2, map 2 by 1, wherever neither the border nor what rolled round it is seen.

    Unit i of map 1 sees pixels 2i - r .. 2i + r with r = kernel // 2, of map 2 pixels 4i - 3r .. 4i + 3r.
    """
    encoder, _ = pair(shape, channels=(3, 5), kernel=kernel)
    x = torch.rand(2, *shape, dtype=torch.float64)
    before, after = Pass(), Pass()
    encoder(x, before)
    encoder(x.roll(4, axis), after)
    for name, step, reach in (("h1", 2, kernel // 2), ("h2", 4, 3 * (kernel // 2))):
        here, shifted = before.taps[name], after.taps[name]
        first, last = -(-(4 + reach) // step), (shape[axis - 1] - 1 - reach) // step
        assert last > first
        inner = (*[slice(None)] * axis, slice(first, last + 1))
        torch.testing.assert_close(shifted[inner], here.roll(4 // step, axis)[inner], rtol=0, atol=1e-13)
        assert not torch.allclose(shifted[inner], here[inner], atol=1e-3)


def test_the_first_layer_is_a_correlation_with_its_filters():
    """h1[n, o, i, j] = relu(b_o + sum_{c,u,v} w[o, c, u, v] x~[n, c, 2i + u, 2j + v]), x~ with one pixel of 0 around it."""
    encoder, _ = pair((2, 5, 7), channels=(3,), kernel=3)
    x = np.random.default_rng(0).normal(size=(2, 2, 5, 7))
    run = Pass()
    encoder(torch.from_numpy(x), run)
    w, b = (p.detach().numpy() for p in encoder.blocks[0][0].parameters())
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    expected = np.empty((2, 3, 3, 4))
    for i in range(3):
        for j in range(4):
            expected[:, :, i, j] = b + np.einsum("ncuv,ocuv->no", padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], w)
    np.testing.assert_allclose(run.taps["h1"].detach(), expected.clip(0), rtol=0, atol=1e-12)


def test_values_and_gradients_are_those_of_torch_s_layers_in_their_usual_layout():
    """Memory layout and the bias added by itself must change nothing: output and gradient of every parameter, in float64."""
    encoder, decoder = pair((3, 13, 11), channels=(5, 7), kernel=3, activation="tanh")
    x = torch.rand(2, 3, 13, 11, dtype=torch.float64)

    def plain(x):
        for layer in (block[0] for block in encoder.blocks):
            x = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding).tanh()
        h = decoder.linear(encoder.latent.linear(x.flatten(1))).tanh().unflatten(1, decoder.start)
        for i, layer in enumerate(block[0] for block in decoder.blocks):
            h = F.conv_transpose2d(h if i == 0 else h.tanh(), layer.weight, layer.bias, 2, layer.padding, layer.output_padding)
        return h

    ours, theirs = decoder(encoder(x, Pass()).mean, Pass())[0].mean, plain(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    slope = torch.randn_like(theirs)
    for one, other in zip(*(torch.autograd.grad(y, parameters, slope) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_pictures_are_the_filters():
    (tiles,) = pair((3, 13, 11), channels=(5,))[0].pictures(None)
    assert (tiles.name, tuple(tiles.tiles.shape)) == ("filters", (5, 3, 3, 3))


@pytest.mark.parametrize("shape", [(3, 7, 11), (2, 13)], **ids)
def test_it_learns_to_rebuild(shape):
    """Rows that differ along one direction: from the loss of random weights towards D/2 log 2 pi, that of no error at all."""
    t = rows(40, (1,))[0]
    wave = np.sin(np.arange(np.prod(shape))).reshape(shape)
    x = t.reshape(-1, *[1] * len(shape)) * wave
    model = {"encoder": {"name": "conv", "channels": [5]}, "decoder": {"name": "conv"}}
    found = resolved(
        shape,
        model=model,
        pretrain={"epochs": 40, "optimizer": {"name": "adam", "lr": 1e-2}, "schedule": CONSTANT, "log_every": 5},
    )
    some = trainer_of(found, "pretrain", feed_of(x), fresh(found))
    history = [entry["train/reconstruction"] for entry in some.run().history if "train/reconstruction" in entry]
    floor = 0.5 * np.prod(shape) * np.log(2 * np.pi)
    assert history[-1] - floor < 0.2 * (history[0] - floor)
