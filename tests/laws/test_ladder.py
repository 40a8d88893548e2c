"""The ladder network against its paper's algorithm 1, written out here in plain torch in float64 (Rasmus et al. 2015)."""

import math

import numpy as np
import pytest
import torch
from command_line import call, with_fields, write_yaml
from conftest import TINY
from engine_kit import CONSTANT, SGD, Keep, assert_same, feed_of, fresh, gradients, plan_of, resolved, rows, trainer_of, weights
from pyarrow import parquet
from sklearn.datasets import load_digits
from ssl_ae_builtins.ladder import Combinator

from ssl_ae import Batch, Need
from ssl_ae.data.card import Y as Labels
from ssl_ae.errors import RecipeError
from ssl_ae.model import frozen
from ssl_ae.objective import count_rows
from ssl_ae.randomness import seed_of

D, WIDTHS, CLASSES = 7, (11, 5), 3
N, SIGMA, EPSILON = 13, 0.3, 1e-5  # epsilon is torch's; the paper's code has 1e-10
LAMBDAS = (20.0, 3.0, 0.5, 0.1)  # of layers 0 to 3
ALPHA = 2 * LAMBDAS[0] / D
NOISE = {"name": "gaussian_noise", "scale": SIGMA, "layers": ["input", "z*"]}
COST = {"name": "ladder", "weight": 1 / ALPHA, "costs": list(LAMBDAS[1:])}
X, Y = rows(N, labeled=0.6)
BATCH = Batch(x=torch.from_numpy(X), y=torch.from_numpy(Y))
STEP = torch.zeros((), dtype=torch.int64)


def ladder(regularizers=(NOISE, COST), activation="relu", decoder=None, **finetune):
    model = {
        "latent_dim": CLASSES,
        "encoder": {"name": "ladder", "widths": list(WIDTHS), "activation": activation},
        "decoder": {"name": "ladder", **(decoder or {})},
        "regularizers": list(regularizers),
        "head": {"name": "softmax", "weights": False},
    }
    return resolved(model=model, finetune={"mode": "joint", "alpha": ALPHA, "optimizer": SGD, "schedule": CONSTANT, **finetune})


def shaken(found, seed=0):
    """Weights after which no parameter has its simple first value."""
    model = fresh(found)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def loss_of(found, model, seed):
    """l_Y + alpha (l_X + ladder / alpha) as the engine weighs it, with noise from `seed`."""
    objective = plan_of(found, model, "joint", feed_of(X, Y)).phases[0].objective
    torch.manual_seed(seed)
    trace = model(BATCH, objective.needs)
    return objective.weigh(objective.shares(trace, count_rows([BATCH])), STEP)


# --- algorithm 1


def normalised(h):
    mean, std = h.mean(0), (h.var(0, correction=0) + EPSILON).sqrt()
    return (h - mean) / std, mean, std


def algorithm_1(model, x, y, seed, activation):
    """C_c + C_d, with the noise that the engine draws from the same seed: the input's first, then layer by layer."""
    enc, dec = model.encoder.layers, model.decoder
    sizes, top = (D, *WIDTHS, CLASSES), len(WIDTHS) + 1
    f = [None, *[getattr(torch, activation)] * len(WIDTHS), lambda h: torch.softmax(h, 1)]
    torch.manual_seed(seed)

    def encode(noise):
        draw = lambda like: SIGMA * torch.randn_like(like) if noise else torch.zeros_like(like)  # noqa: E731
        z, mean, std = {0: x + draw(x)}, {}, {}
        h = z[0]
        for level in range(1, top + 1):
            pure, mean[level], std[level] = normalised(h @ enc[level - 1].linear.weight.T)
            z[level] = pure + draw(pure)
            gamma = 1.0 if enc[level - 1].gamma is None else enc[level - 1].gamma
            h = f[level](gamma * (z[level] + enc[level - 1].beta))
        return z, h, mean, std

    noisy, h_noisy, _, _ = encode(noise=True)
    clean, _, mean, std = encode(noise=False)
    guess = {}
    for level in range(top, -1, -1):
        u, _, _ = normalised(h_noisy if level == top else guess[level + 1] @ dec.linears[level].weight.T)
        a = dec.combinators[level].a
        mu = a[0] * torch.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]
        v = a[5] * torch.sigmoid(a[6] * u + a[7]) + a[8] * u + a[9]
        guess[level] = (noisy[level] - mu) * v + mu
    known = y >= 0
    supervised = -h_noisy[known].log()[torch.arange(int(known.sum())), y[known]].mean()
    denoising = LAMBDAS[0] * (guess[0] - x).square().mean()
    for level in range(1, top + 1):
        error = (guess[level] - mean[level]) / std[level] - clean[level]
        denoising = denoising + LAMBDAS[level] * error.square().sum() / (N * sizes[level])
    return supervised + denoising


@pytest.mark.parametrize("activation", ["relu", "tanh"], ids=["without gamma", "with gamma"])
def test_value_and_gradient_are_those_of_algorithm_1(activation):
    """Up to alpha D/2 log 2 pi, the gaussian's constant. The gradient goes through the undisturbed pass and its moments too."""
    found = ladder(activation=activation)
    model, reference = shaken(found), shaken(found)
    loss = loss_of(found, model, seed=7)
    expected = algorithm_1(reference, BATCH.x, BATCH.y, seed=7, activation=activation)
    constant = ALPHA * D / 2 * math.log(2 * math.pi)
    assert loss.item() - constant == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    assert_same(gradients(model), gradients(reference), atol=1e-10)
    assert len(gradients(model)) == len(list(model.parameters()))


def test_a_step_of_the_trainer_descends_along_it():
    """The same through feed, plan and optimizer: w <- w - lr gradient, with the noise of the step's own seed."""
    found = ladder(labeled_fraction=0.0, batch_size=N, optimizer=SGD | {"lr": 1e-2})
    some = trainer_of(found, "joint", feed_of(X, Y), shaken(found))
    before, reference = weights(some.model), shaken(found)
    (batch,) = some.feed.batches([(some.runs[0].phase.draw, 0)])
    some.make_step(some.runs[0], [batch])
    expected = algorithm_1(reference, batch.x, batch.y, seed=seed_of(5, 0, 0), activation="relu")
    expected.backward()
    for name, p in reference.named_parameters():
        after = dict(some.model.named_parameters())[name]
        torch.testing.assert_close(after.detach(), before[name] - 1e-2 * p.grad, rtol=0, atol=1e-12)


# --- the degenerate case


def test_without_noise_and_cost_it_is_the_plain_supervised_net():
    """torch's own batch-norm between the same matrices: same l_Y, same gradient, same running means."""
    found = ladder(regularizers=(), alpha=0.0)
    some = trainer_of(found, "joint", feed_of(X, Y), shaken(found))
    reference = shaken(found).encoder
    h, norms = BATCH.x, []
    for layer in reference.layers:
        norms.append(torch.nn.BatchNorm1d(layer.linear.out_features, affine=False).double())
        h = norms[-1](layer.linear(h)) + layer.beta
        h = torch.relu(h) if len(norms) <= len(WIDTHS) else layer.gamma * h
    known = BATCH.y >= 0
    expected = torch.nn.functional.cross_entropy(h[known], BATCH.y[known])
    expected.backward()
    some.make_step(some.runs[0], [BATCH])
    terms = dict(zip(some.runs[0].terms, some.runs[0].shares.tolist(), strict=True))
    assert terms["supervised"] == pytest.approx(expected.item(), rel=1e-6)  # readings are float32
    ours = gradients(some.model)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(ours[f"encoder.{name}"], p.grad, rtol=0, atol=1e-12)
    assert not any(ours[name].any() for name in ours if name.startswith("decoder."))
    for layer, norm in zip(some.model.encoder.layers, norms, strict=True):
        torch.testing.assert_close(layer.moments.mean, norm.running_mean, rtol=0, atol=1e-14)


# --- who moves the running statistics


def test_running_statistics_of_the_encoder_follow_the_undisturbed_pass_alone():
    """With noise they are to the bit what they are without, and the first layer's by hand; the decoder's meet the noise."""
    noisy, quiet = shaken(ladder()), shaken(ladder(regularizers=(COST,)))
    for model in (noisy, quiet):
        model(BATCH, frozenset({Need.CLEAN, Need.RECONSTRUCTION}))
    found, expected = dict(noisy.named_buffers()), dict(quiet.named_buffers())
    for name, value in expected.items():
        assert torch.equal(found[name], value) == name.startswith("encoder."), name
    before = dict(shaken(ladder()).named_buffers())
    assert not any(torch.equal(value, before[name]) for name, value in found.items())
    pure = X @ noisy.encoder.layers[0].linear.weight.detach().numpy().T
    np.testing.assert_allclose(found["encoder.layers.0.moments.mean"], 0.1 * pure.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["encoder.layers.0.moments.var"], 0.9 + 0.1 * pure.var(0), rtol=1e-12)


def test_evaluation_uses_them_and_moves_nothing():
    model = shaken(ladder())
    model(BATCH, frozenset({Need.CLEAN, Need.RECONSTRUCTION}))
    before = weights(model)
    with frozen(model):
        together = model.features(BATCH.x)
        alone = torch.cat([model.features(row[None]) for row in BATCH.x])
        model.reconstruct(BATCH.x)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert_same(weights(model), before)


# --- the combinator


def test_the_combinator_by_hand():
    """At the start 0; and for numbers drawn at random, one unit at a time in Python."""
    combinator, random = Combinator(5).double(), np.random.default_rng(0)
    z, u = random.normal(size=(2, 3, 5))
    assert not combinator(torch.from_numpy(z), torch.from_numpy(u)).any()
    a = random.normal(size=(10, 5))
    with torch.no_grad():
        for p, value in zip(combinator.a, a, strict=True):
            p.copy_(torch.from_numpy(value))
    found = combinator(torch.from_numpy(z), torch.from_numpy(u)).detach()
    s = lambda t: 1 / (1 + math.exp(-t))  # noqa: E731
    for n in range(3):
        for i in range(5):
            b, t = a[:, i], u[n, i]
            mu = b[0] * s(b[1] * t + b[2]) + b[3] * t + b[4]
            v = b[5] * s(b[6] * t + b[7]) + b[8] * t + b[9]
            assert float(found[n, i]) == pytest.approx((z[n, i] - mu) * v + mu, rel=1e-12)


def test_the_combinator_holds_the_best_denoiser_of_a_gaussian():
    """z | u ~ N(m(u), 1), z~ = z + sigma eps: E[z | z~, u] = m + (z~ - m) / (1 + sigma^2) with error sigma^2 / (1 + sigma^2).

    m(u) = 2 sigmoid(3 u) - u is one of its means; within 5 standard errors, and neither z~ nor u alone comes near.
    """
    n, sigma = 200_000, 0.7
    generator = torch.Generator().manual_seed(0)
    u, own, noise = torch.randn(3, n, 1, generator=generator, dtype=torch.float64)
    mean = 2 * torch.sigmoid(3 * u) - u
    z, best = mean + own, sigma**2 / (1 + sigma**2)
    combinator = Combinator(1).double()
    with torch.no_grad():
        for p, value in zip(combinator.a, (2.0, 3.0, 0.0, -1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1 / (1 + sigma**2)), strict=True):
            p.fill_(value)
        errors = (combinator(z + sigma * noise, u) - z).square()
    assert abs(float(errors.mean()) - best) < 5 * float(errors.std()) / n**0.5
    assert best < 0.75 * min(sigma**2, 1.0)


# --- what its noun promises: no layers, no decoding


def test_it_reconstructs_samples_but_decodes_no_code():
    model = shaken(ladder()).eval()
    q, p = model.round_trip(BATCH.x)
    assert torch.equal(q.mean, model.features(BATCH.x))
    assert torch.equal(p.mean, model.reconstruct(BATCH.x).mean)
    assert torch.equal(p.mean, model(BATCH, frozenset({Need.RECONSTRUCTION})).p_x.mean)
    with pytest.raises(RecipeError, match="decoder ladder reads the layers of the encoder beside the code"):
        model.decode(q.mean)


def test_several_draws_decode_with_the_layers_of_their_rows():
    """A code that is certain gives the same p(x|z) each time; running statistics learn from the first decoding alone."""
    found = ladder()
    one, three = shaken(found), shaken(found)
    three.samples = 3
    losses = [loss_of(found, model, seed=7) for model in (one, three)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    assert_same(weights(three), weights(one))


def test_commands_that_decode_work(here, digits):
    """extract --scores and predict run encoder and decoder in one pass."""
    model = {
        "latent_dim": 10,
        "encoder": {"name": "ladder", "widths": [17]},
        "decoder": {"name": "ladder"},
        "regularizers": [NOISE, COST | {"costs": [1]}],
        "head": {"name": "softmax", "weights": False},
    }
    fields = {"data.path": str(digits), "model": model, "finetune.mode": "joint"}
    path = write_yaml(here / "recipe.yaml", with_fields(TINY, fields))
    assert call("pretrain", path, "--epochs", 1).code == 0
    assert call("extract", "runs/tiny", "--split", "val", "--scores").code == 0
    assert call("finetune", path, "--epochs", 1).code == 0
    assert call("predict", "runs/tiny", digits, "--out", "predicted.parquet").code == 0
    (part,) = (here / "runs/tiny/latents/val").glob("part-*.parquet")
    for table in (part, here / "predicted.parquet"):
        assert np.isfinite(parquet.read_table(table)["reconstruction_nats"].to_numpy()).all()


# --- it learns


def test_its_costs_fall_on_digits():
    """64-40-10 with 5 labels a class: every term of the last reading is below the first's, and most rows are told apart."""
    x, y = load_digits(return_X_y=True)
    x, known = x / 16, np.full(1000, -1)
    for c in range(10):
        chosen = np.flatnonzero(y[:1000] == c)[:5]
        known[chosen] = c
    model = {
        "latent_dim": 10,
        "encoder": {"name": "ladder", "widths": [40]},
        "decoder": {"name": "ladder"},
        "regularizers": [NOISE, {"name": "ladder", "weight": 1.0, "costs": [1, 0.1]}],
        "head": {"name": "softmax", "weights": False},
    }
    training = {"mode": "joint", "alpha": 0.3, "epochs": 20, "batch_size": 100, "optimizer": {"name": "adam", "lr": 5e-3}}
    found = resolved(
        (64,), y=Labels(task="classes", names=tuple("0123456789")), model=model, finetune=training | {"log_every": 10}
    )
    kept, listener = fresh(found, dtype=torch.float32), Keep()
    trainer_of(found, "joint", feed_of(x[:1000], known, dtype=torch.float32), kept, listener=listener).run()
    first, last = (dict(values) for _, values in (listener.measures[0], listener.measures[-1]))
    constant = 32 * math.log(2 * math.pi)
    for name, floor in (("supervised", 0), ("reconstruction", constant), ("ladder", 0)):
        assert last[f"train/{name}"] - floor < 0.7 * (first[f"train/{name}"] - floor), name
    guessed = kept.predict(torch.from_numpy(x[1000:]).float()).logits.argmax(1).numpy()
    assert (guessed == y[1000:]).mean() > 0.7  # chance is 10 %


# --- recipes that cannot be

LADDER = {"name": "ladder", "widths": [11]}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"decoder": {"name": "ladder"}},
            "it reads the layers z1, z2, ... of the ladder encoder, but the encoder is builtins/mlp",
        ),
        ({"encoder": LADDER, "regularizers": [COST]}, "but the decoder is builtins/mlp. Set model.encoder.name and"),
        ({"encoder": LADDER, "decoder": {"name": "ladder", "widths": [3]}}, "has a step for each layer of the encoder"),
        (
            {"encoder": LADDER, "decoder": {"name": "ladder"}, "regularizers": [COST]},
            "the encoder has 2 layers, z1 to z2 (the code's)",
        ),
        ({"encoder": LADDER, "regularizers": [{"name": "kl"}]}, "kl needs a random posterior"),
    ],
)
def test_refused(model, message):
    with pytest.raises(RecipeError) as refusal:
        resolved(model=model)
    assert message in str(refusal.value)


def test_its_encoder_serves_other_decoders():
    found = resolved(model={"encoder": LADDER, "decoder": {"name": "mlp"}})
    assert found.decoder.config.widths == (11,)
    assert fresh(found).reconstruct(BATCH.x).mean.shape == (N, D)


def test_extra_labelled_rows_do_not_move_the_others():
    """Labelled and unlabelled rows are normalised apart, as in the authors' code: else size alone would tell them apart."""
    found, uniform = ladder(regularizers=(COST,)), torch.arange(N) < 8
    model, alone = shaken(found), shaken(found)
    needs = frozenset({Need.CLEAN, Need.RECONSTRUCTION})
    both = model(Batch(x=BATCH.x * torch.where(uniform, 1.0, 9.0)[:, None], uniform=uniform), needs)
    few = alone(Batch(x=BATCH.x[:8]), needs)
    for layer in ("z1", "z2", "z3"):
        torch.testing.assert_close(both.clean[layer][:8], few.clean[layer])
        torch.testing.assert_close(both.rebuilt[layer][:8], few.rebuilt[layer])
    torch.testing.assert_close(weights(model), weights(alone))  # what is learnt for evaluation is the uniform rows' too
