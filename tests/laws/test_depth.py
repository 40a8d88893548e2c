"""Fully connected networks of any depth: sizes, mirrors, slices, the code's activation, and what depth buys on digits."""

import math
import time

import numpy as np
import pytest
import torch
from engine_kit import feed_of, fresh, resolved, trainer_of
from scipy.special import expit
from sklearn.datasets import load_digits
from ssl_ae_builtins.mlp import MlpDecoder, MlpEncoder

from ssl_ae import Pass, Shapes
from ssl_ae.errors import RecipeError

SHAPE = (3, 7, 11)  # 231 numbers


def pair(latent=5, decoder=None, shape=SHAPE, **options):
    """Encoder and decoder as a recipe makes them."""
    torch.manual_seed(0)
    shapes = Shapes(x=shape, latent=latent)
    theirs = MlpEncoder.Config(**options)
    ours = MlpDecoder.mirrored(MlpDecoder.Config(**(decoder or {})), theirs)
    return MlpEncoder(theirs, shapes).double(), MlpDecoder(ours, shapes).double()


def sizes(encoder, decoder):
    """Units of every layer, from x to the code and from the code to x."""
    up = [block[0].weight.shape for block in encoder.layers.blocks] + [encoder.latent.linear.weight.shape]
    down = [block[0].weight.shape for block in decoder.layers.blocks] + [decoder.linear.weight.shape]
    return [up[0][1], *(shape[0] for shape in up)], [down[0][1], *(shape[0] for shape in down)]


@pytest.mark.parametrize("widths", [[], [17], [23, 13], [29, 23, 19, 17, 13, 7]])
def test_the_decoder_mirrors_the_encoder(widths):
    up, down = sizes(*pair(widths=widths))
    assert up == [231, *widths, 5]
    assert down == up[::-1]


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
@pytest.mark.parametrize("latent", [5, 409], ids=["bottleneck", "overcomplete"])
def test_auto_widths_go_from_the_sample_to_the_code_by_one_factor(depth, latent):
    """231 (K / 231)^(l / (L + 1)) is numpy's geomspace from 231 to K."""
    up, down = sizes(*pair(latent, widths="auto", depth=depth))
    assert up == np.rint(np.geomspace(231, latent, depth + 2)).astype(int).tolist()
    assert down == up[::-1]
    assert up == sorted(up, reverse=latent < 231)


def test_auto_widths_by_hand():
    """64 -> 4 over 3 hidden layers halves each time; two layers unless the recipe says otherwise."""
    assert sizes(*pair(4, shape=(64,), widths="auto", depth=3))[0] == [64, 32, 16, 8, 4]
    assert sizes(*pair(8, shape=(64,), widths="auto"))[0] == [64, 32, 16, 8]
    assert sizes(*pair(1, shape=(2,), widths="auto", depth=4))[0] == [
        2,
        2,
        2,
        1,
        1,
        1,
    ]  # 2^(4/5), 2^(3/5), ...: no layer is empty


def test_a_decoder_may_differ_from_the_encoder():
    """Its own widths, its own depth of automatic ones, or automatic ones beside the encoder's by hand."""
    up, down = sizes(*pair(widths="auto", depth=3, decoder={"widths": [13]}))
    assert (len(up), down) == (5, [5, 13, 231])
    assert len(sizes(*pair(widths="auto", depth=3, decoder={"widths": "auto", "depth": 1}))[1]) == 3
    assert len(sizes(*pair(widths="auto", depth=3, decoder={"widths": "auto"}))[1]) == 5
    assert sizes(*pair(widths=[17], decoder={"widths": "auto"}))[1] == [5, 18, 64, 231]  # 5 (231 / 5)^(1/3), 5 (231 / 5)^(2/3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"encoder": {"name": "mlp", "widths": "wide"}}, 'encoder.widths = "wide": expected a list of sizes, or auto.'),
        ({"encoder": {"name": "mlp", "widths": [3, 0]}}, "encoder.widths.1 = 0: expected greater than or equal to 1"),
        ({"encoder": {"name": "mlp", "widths": [3], "depth": 2}}, "encoder.depth = 2: has no effect with widths = "),
        ({"decoder": {"name": "mlp", "depth": 2}}, "decoder.depth = 2: has no effect with widths = "),
        (
            {"encoder": {"name": "mlp", "code_activation": "tanh", "posterior": "diag"}},
            "code_activation = tanh: a code drawn from a diag posterior has no activation",
        ),
    ],
)
def test_refused(model, message):
    with pytest.raises(RecipeError) as refusal:
        resolved(model=model)
    assert message in str(refusal.value)


def test_a_network_by_hand():
    """code = tanh(W2 sigmoid(W1 x + b1) + b2) in numpy."""
    encoder, _ = pair(widths=[13], activation="sigmoid", code_activation="tanh")
    x = np.random.default_rng(0).random((3, *SHAPE))
    w1, b1, w2, b2 = (p.detach().numpy() for p in encoder.parameters())
    expected = np.tanh(expit(x.reshape(3, -1) @ w1.T + b1) @ w2.T + b2)
    np.testing.assert_allclose(encoder(torch.from_numpy(x), Pass()).mean.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ()),
        ({"activation": "sigmoid"}, ("h*",)),
        ({"activation": "sigmoid", "widths": []}, ()),
        ({"activation": "sigmoid", "widths": "auto", "batch_norm": True}, ("h*",)),
        ({"code_activation": "sigmoid"}, ("code",)),
        ({"activation": "sigmoid", "code_activation": "sigmoid"}, ("h*", "code")),
        ({"activation": "hardtanh", "code_activation": "tanh"}, ()),  # these are negative too
    ],
)
def test_layers_of_the_unit_interval(options, expected):
    assert MlpEncoder.unit_interval(MlpEncoder.Config(**options)) == expected


def test_slices_of_the_decoder_share_its_parameters_and_make_it_up():
    """One after another they give what the whole gives; each has the mirror's shapes and, inside, a unit-variance gaussian."""
    _, decoder = pair(widths=[17, 13], activation="tanh", decoder={"likelihood": "bernoulli"})
    slices = decoder.slices()
    assert len(slices) == MlpDecoder.parts(decoder.config) == 3
    assert [(part.shapes.latent, part.shapes.x) for part in slices] == [(5, (13,)), (13, (17,)), (17, SHAPE)]
    theirs, whole = [{id(p) for p in part.parameters()} for part in slices], {id(p) for p in decoder.parameters()}
    assert set().union(*theirs) == whole
    assert sum(map(len, theirs)) == len(whole)
    z = torch.randn(2, 5, dtype=torch.float64)
    h, expected = z, decoder(z, Pass())[0]
    for part in slices[:-1]:
        p = part(h, Pass())[0]
        highest = -0.5 * math.log(2 * math.pi) * part.shapes.x[0]
        assert p.log_prob(p.mean).tolist() == pytest.approx([highest, highest], rel=1e-12)
        h = p.mean
    last = slices[-1](h, Pass())[0]
    assert torch.equal(last.base_dist.logits, expected.base_dist.logits)


def test_no_slices_of_one_layer():
    _, decoder = pair(widths=[])
    assert (decoder.slices(), MlpDecoder.parts(decoder.config)) == ((), 1)


def test_pictures_are_the_rows_of_the_first_matrix():
    for widths, expected in (([13, 7], 13), ([], 5)):
        encoder, _ = pair(widths=widths, posterior="diag")
        (tiles,) = encoder.pictures(None)
        assert tuple(tiles.tiles.shape) == (expected, *SHAPE)
        first = encoder.layers.blocks[0][0] if widths else encoder.latent.linear
        assert torch.equal(tiles.tiles[3].flatten(), first.weight[3])


@pytest.mark.slow
def test_reconstruction_by_depth_on_digits(record_property, capsys):
    """Recorded: mse a pixel of 64-...-8-...-64 on 400 held-out digits. Asserted is only that all are better than the mean."""
    x = load_digits().data / 16
    errors = {}
    for depth in (0, 1, 2, 3, 4):
        encoder = {"name": "mlp", "activation": "elu", **({"widths": "auto", "depth": depth} if depth else {"widths": []})}
        training = {"epochs": 60, "batch_size": 64, "optimizer": {"name": "adam", "lr": 5e-3}, "schedule": {"name": "cosine"}}
        found = resolved((64,), model={"latent_dim": 8, "encoder": encoder}, pretrain=training)
        model, started = fresh(found, dtype=torch.float32), time.perf_counter()
        trainer_of(found, "pretrain", feed_of(x[:1397], dtype=torch.float32), model).run()
        held_out = torch.from_numpy(x[1397:]).float()
        with torch.no_grad():
            errors[depth] = float((model.decode(model.features(held_out)).mean - held_out).square().mean())
        record_property(f"mse_of_depth_{depth}", errors[depth])
        with capsys.disabled():
            print(f"\ndepth {depth}: mse {errors[depth]:.5f} after {time.perf_counter() - started:.1f} s", end="")
    assert max(errors.values()) < float(x[1397:].var(0).mean())
