"""Penalties by closed form and gradient, corruptions by expectation; reference steps are written out by hand."""

import numpy as np
import pytest
import torch
from engine_kit import feed_of as feed
from engine_kit import fresh, gradients, part, resolved, rows, trainer_of
from ssl_ae_builtins.noise import Dropout, GaussianNoise, MaskingNoise
from ssl_ae_builtins.penalties import SparseL1, Weights
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from ssl_ae import Batch, Shapes
from ssl_ae.latent import BernoulliCode, CategoricalCode, kl_to_prior
from ssl_ae.model import Model, Slice
from ssl_ae.objective import Weight
from ssl_ae.trace import Trace

SHAPES = Shapes(x=(7,), latent=5, classes=3)


def matrices(model):
    """Encoder's and decoder's weight matrices, by name."""
    named = model.named_parameters()
    return {name: p for name, p in named if p.dim() > 1 and not name.startswith("head.")}


def built(cls, **options):
    return part(cls, options=options).build(SHAPES)


# --- weights


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_weights_by_closed_form_and_gradient(norm):
    model = fresh(resolved(model={"regularizers": [{"name": "weights", "norm": norm}]}))
    (regularizer,) = model.regularizers
    value = regularizer.penalty(Trace(model=model))
    flat = np.concatenate([p.detach().numpy().ravel() for p in matrices(model).values()])
    expected = np.abs(flat).sum() if norm == "l1" else 0.5 * (flat**2).sum()
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
    value.backward()
    found = gradients(model)
    assert found.keys() == matrices(model).keys()  # biases and the head are free
    for name, p in matrices(model).items():
        assert torch.equal(found[name], p.detach().sign() if norm == "l1" else p.detach())


def test_a_step_with_weights_is_a_hand_made_sgd_step():
    """w <- w - lr (grad mean_i l_X(i) + lambda w) and b <- b - lr grad mean_i l_X(i), by autograd of the bare formulas."""
    lr, factor = 0.1, 0.03
    found = resolved(model={"regularizers": [{"name": "weights", "weight": factor}]})
    x, _ = rows(8)
    trainer = trainer_of(found, "pretrain", feed(x))
    reference = fresh(found)
    w = {name: p for name, p in reference.named_parameters() if not name.startswith("head.")}
    batch = torch.from_numpy(x)
    h = torch.tanh(batch @ w["encoder.layers.blocks.0.0.weight"].T + w["encoder.layers.blocks.0.0.bias"])
    z = h @ w["encoder.latent.linear.weight"].T + w["encoder.latent.linear.bias"]
    d = torch.tanh(z @ w["decoder.layers.blocks.0.0.weight"].T + w["decoder.layers.blocks.0.0.bias"])
    rebuilt = d @ w["decoder.linear.weight"].T + w["decoder.linear.bias"]
    (0.5 * (batch - rebuilt).square().sum(1)).mean().backward()
    trainer.make_step(trainer.runs[0], [Batch(x=batch)])
    after = dict(trainer.model.named_parameters())
    for name, p in w.items():
        expected = p.detach() - lr * (p.grad + (factor * p.detach() if p.dim() > 1 else 0.0))
        torch.testing.assert_close(after[name].detach(), expected, rtol=0, atol=1e-12)


class NoMatrices(torch.nn.Module):
    """A part of a model whose parameters are a bias."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))


def test_weights_of_parts_without_matrices():
    """An encoder may read the decoder's parameters, and a decoder have none: no matrices, no penalty, and still a gradient."""
    decoder = torch.nn.Linear(3, 2, dtype=torch.float64)
    value = built(Weights).penalty(Trace(model=Model(NoMatrices(), decoder)))
    assert float(value.detach()) == pytest.approx(0.5 * float(decoder.weight.detach().square().sum()), rel=1e-12)
    for norm in ("l1", "l2"):
        nothing = built(Weights, norm=norm).penalty(Trace(model=Model(NoMatrices(), NoMatrices())))
        assert (nothing.shape, nothing.dtype, float(nothing.detach())) == ((), torch.float64, 0.0)
        nothing.backward()


def test_weights_of_a_part_that_does_not_train():
    """Classifying with a frozen decoder, whose matrices are all there are: its penalty is reported and moves nothing."""
    decoder = torch.nn.Linear(3, 2).requires_grad_(False)
    value = built(Weights, norm="l1").penalty(Trace(model=Model(NoMatrices(), decoder)))
    value.backward()
    assert float(value.detach()) == pytest.approx(float(decoder.weight.abs().sum()), rel=1e-6)


def test_weights_of_a_slice_are_those_of_its_layer_and_its_mirror():
    encoder = {"name": "stack", "widths": [11]}
    model = fresh(resolved(model={"encoder": encoder, "regularizers": [{"name": "weights"}]}))
    value = model.regularizers[0].penalty(Trace(model=Slice(model, 1)))
    inner = [model.encoder.layers[1][0].weight, model.decoder.layers.blocks[0][0].weight]  # 11 -> 5 and 5 -> 11
    assert [tuple(p.shape) for p in inner] == [(5, 11), (11, 5)]
    assert float(value.detach()) == pytest.approx(sum(0.5 * float(p.detach().square().sum()) for p in inner), rel=1e-12)


# --- codes


def test_sparse_l1_is_the_sum_of_absolute_codes():
    code, h1 = torch.randn(11, 5), torch.randn(11, 2, 3)
    trace = Trace(model=None, taps={"input": torch.ones(11, 7), "h1": h1, "code": code})
    np.testing.assert_allclose(built(SparseL1).penalty(trace), np.abs(code.numpy()).sum(1), rtol=1e-6)
    both = part(SparseL1, layers=("code", "h*")).build(SHAPES).penalty(trace)
    np.testing.assert_allclose(both, np.abs(code.numpy()).sum(1) + np.abs(h1.numpy()).sum((1, 2)), rtol=1e-6)


@pytest.mark.parametrize(("posterior", "latent"), [("diag", 5), ("full", 3)])
def test_kl_of_the_traced_posterior(posterior, latent):
    encoder = {"name": "mlp", "widths": [11], "posterior": posterior}
    found = resolved(model={"latent_dim": latent, "encoder": encoder, "regularizers": [{"name": "kl"}]})
    model = fresh(found)
    trace = model(Batch(x=torch.from_numpy(rows(13)[0])))
    zero, eye = torch.zeros(latent, dtype=torch.float64), torch.eye(latent, dtype=torch.float64)
    prior = Independent(Normal(zero, 1 + zero), 1) if posterior == "diag" else MultivariateNormal(zero, eye)
    torch.testing.assert_close(model.regularizers[0].penalty(trace), kl_divergence(trace.q, prior), rtol=1e-10, atol=0)


def picture_of(q):
    random = {"encoder": {"name": "mlp", "posterior": "diag"}, "regularizers": [{"name": "kl"}]}
    (regularizer,) = fresh(resolved(model=random)).regularizers
    (picture,) = regularizer.pictures(Trace(model=None, q=q))
    return picture.title, picture.lines["KL"]


def test_the_picture_of_kl_says_which_dimensions_are_used():
    """By hand: KL(N(m, 1) || N(0, 1)) = m^2 / 2, so 2, 0.5 and 0 nats, largest first; the rows differ in sign alone."""
    mean = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 0.0, 2.0]])
    title, nats = picture_of(Independent(Normal(mean, torch.ones(2, 3)), 1))
    assert nats.tolist() == pytest.approx([2.0, 0.5, 0.0])
    assert title.endswith("2 of 3 above 0.01 nats")


def test_what_the_picture_of_kl_adds_up_to():
    """The KL itself where dimensions are independent given x; less under full covariance, by what they share."""
    torch.manual_seed(0)
    mean, scale = torch.randn(13, 5), torch.rand(13, 5) + 0.3
    for q in (Independent(Normal(mean, scale), 1), BernoulliCode(mean), CategoricalCode(torch.randn(13, 3, 7))):
        assert float(picture_of(q)[1].sum()) == pytest.approx(float(kl_to_prior(q).mean()), rel=1e-5)
    full = MultivariateNormal(mean, scale_tril=torch.diag_embed(scale) + 0.5 * torch.ones(5, 5).tril(-1))
    assert float(picture_of(full)[1].sum()) < float(kl_to_prior(full).mean()) - 0.1


def test_a_warm_up_weighs_each_step():
    """beta(step) = 4 min(1, (step + 1) / 5): 0.8, 1.6, ..., 4, 4."""
    weight = Weight(4.0, warmup_steps=5)
    found = [float(weight.at(torch.tensor(step))) for step in range(7)]
    assert found == pytest.approx([0.8, 1.6, 2.4, 3.2, 4.0, 4.0, 4.0], rel=1e-6)


def test_a_warm_up_scales_the_gradient_step_by_step():
    """With lr so small that the weights stay, the gradient of step t is that of the objective with the weight of step t."""
    entry = {"name": "sparse_l1", "weight": 2.0, "warmup_steps": 4}
    found = resolved(model={"regularizers": [entry]}, pretrain={"optimizer": {"name": "sgd", "lr": 1e-300, "momentum": 0.0}})
    batch = Batch(x=torch.from_numpy(rows(8)[0]))

    def gradient_at(step, weight):
        plain = resolved(model={"regularizers": [{"name": "sparse_l1", "weight": weight}]})
        model = fresh(plain)
        trainer = trainer_of(plain, "pretrain", feed(batch.x.numpy()), model)
        trainer.make_step(trainer.runs[0], [batch])
        return gradients(model)

    trainer = trainer_of(found, "pretrain", feed(batch.x.numpy()))
    for step, beta in enumerate([0.5, 1.0, 1.5, 2.0, 2.0]):
        trainer.make_step(trainer.runs[0], [batch])
        for name, expected in gradient_at(step, beta).items():
            torch.testing.assert_close(dict(trainer.model.named_parameters())[name].grad, expected, rtol=0, atol=1e-12)


# --- corruptions


def test_dropout_keeps_the_expectation():
    """Mean of n kept-or-dropped ones: 1 with sd sqrt(rate / (1 - rate) / n); within 5 of them."""
    torch.manual_seed(0)
    rate, n = 0.3, 200_000
    h = built(Dropout, rate=rate).perturb(torch.ones(n), "h1")
    assert abs(float(h.mean()) - 1.0) < 5 * (rate / (1 - rate) / n) ** 0.5
    assert h.unique().tolist() == pytest.approx([0.0, 1 / 0.7], rel=1e-6)


def test_masking_zeroes_its_fraction_and_leaves_the_rest():
    torch.manual_seed(0)
    fraction, n = 0.25, 200_000
    x = torch.rand(n) + 1.0
    masked = built(MaskingNoise, fraction=fraction).perturb(x, "input")
    gone = masked == 0
    assert abs(float(gone.float().mean()) - fraction) < 5 * (fraction * (1 - fraction) / n) ** 0.5
    assert torch.equal(masked[~gone], x[~gone])


def test_gaussian_noise_has_its_standard_deviation():
    torch.manual_seed(0)
    scale, n = 0.4, 200_000
    noise = built(GaussianNoise, scale=scale).perturb(torch.zeros(n), "input")
    assert abs(float(noise.mean())) < 5 * scale / n**0.5
    assert abs(float(noise.std()) - scale) < 5 * scale / (2 * n) ** 0.5


NOISES = [{"name": "gaussian_noise"}, {"name": "masking_noise"}, {"name": "dropout", "rate": 0.5}]


@pytest.mark.parametrize("noise", NOISES, ids=lambda entry: entry["name"])
def test_noise_acts_in_training_alone_and_the_target_stays_clean(noise):
    layer = "h1" if noise["name"] == "dropout" else "input"
    model = fresh(resolved(model={"regularizers": [noise]}))
    batch = Batch(x=torch.from_numpy(rows(13)[0]))
    trained = model(batch)
    assert torch.equal(trained.batch.target, batch.x)
    model.eval()
    judged = model(batch)
    assert torch.equal(judged.taps["input"], batch.x)
    assert not torch.equal(trained.taps[layer], judged.taps[layer])
    assert torch.equal(model.features(batch.x), judged.q.mean)


@pytest.mark.parametrize("noise", NOISES, ids=lambda entry: entry["name"])
def test_noise_is_fresh_at_every_step(noise):
    layer = "h1" if noise["name"] == "dropout" else "input"
    found = resolved(
        model={"regularizers": [noise]}, pretrain={"optimizer": {"name": "sgd", "lr": 1e-300}, "batch_size": 13, "epochs": 3}
    )
    x, _ = rows(13)
    trainer = trainer_of(found, "pretrain", feed(x))
    seen = []
    trainer.model.decoder.register_forward_hook(lambda module, given, out: seen.append(given[1].taps[layer].detach()))
    for step in range(3):
        trainer.progress.step = step
        trainer.make_step(trainer.runs[0], [Batch(x=torch.from_numpy(x))])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    trainer.progress.step = 1
    trainer.make_step(trainer.runs[0], [Batch(x=torch.from_numpy(x))])
    assert torch.equal(seen[3], seen[1])  # and it is the step's own


def test_always_perturbs_in_evaluation_too():
    class Halved(GaussianNoise):
        name, always = "halved", True

        def perturb(self, h, layer):
            return h / 2

    found = resolved(extra=[(Halved,)])
    model = fresh(found).eval()
    x = torch.from_numpy(rows(13)[0])
    plain = fresh(resolved()).eval()
    torch.testing.assert_close(model.features(x), plain.features(x / 2), rtol=0, atol=0)
