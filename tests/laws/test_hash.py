"""Semantic hashing: annealed noise in training, exact bits everywhere else, and drawn symbols."""

import pytest
import torch
from engine_kit import feed_of, fresh, part, resolved, rows, trainer_of
from ssl_ae_builtins.penalties import Kl

from ssl_ae import Batch, Need
from ssl_ae.errors import RecipeError
from ssl_ae.model import frozen
from ssl_ae.trace import Pass


def found_of(latent=6, **options):
    encoder = {"name": "hash", "widths": [11], "activation": "tanh", **options}
    return resolved(model={"latent_dim": latent, "encoder": encoder})


def batch_of(count=13):
    return Batch(x=torch.from_numpy(rows(count)[0]))


def logits_of(model, x):
    run = Pass()
    model.encoder(x, run)
    return run.taps["logits"]


def test_undisturbed_codes_are_bits_by_threshold():
    model, batch = fresh(found_of()), batch_of()
    expected = (logits_of(model, batch.x) > 0).double()
    assert 0 < float(expected.mean()) < 1
    for mode in (model.train(), model.eval()):  # it is the step that disturbs, not the mode
        assert torch.equal(mode.features(batch.x), expected)
    assert not model.posterior(batch.x).stddev.any()


def test_gradients_pass_through_a_bit_as_through_the_logistic():
    model, batch = fresh(found_of()), batch_of()
    slope = torch.linspace(-1, 2, 6, dtype=torch.float64)
    weight = model.encoder.linear.weight
    (found,) = torch.autograd.grad((model.features(batch.x) * slope).sum(), weight)
    (expected,) = torch.autograd.grad((logits_of(model, batch.x).sigmoid() * slope).sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_noise_of_a_training_step():
    """sigmoid(s + sigma eps), sigma = 3 min(1, (step + 1) / 4), with eps of the same seed."""
    model, batch = fresh(found_of(noise=3.0, anneal_steps=4)).train(), batch_of()
    logits = logits_of(model, batch.x)
    for step, sigma in enumerate([0.75, 1.5, 2.25, 3.0, 3.0]):
        torch.manual_seed(7)
        trace = model(batch, frozenset({Need.CLEAN}), step=torch.tensor(step))
        torch.manual_seed(7)
        eps = torch.randn(13, 6, dtype=torch.float64)
        torch.testing.assert_close(trace.taps["code"], torch.sigmoid(logits + sigma * eps), rtol=1e-10, atol=0)
        assert torch.equal(trace.clean["code"], (logits > 0).double())


def test_without_noise_it_is_the_logistic():
    model, batch = fresh(found_of(noise=0.0)).train(), batch_of()
    trace = model(batch, step=torch.tensor(10_000))
    torch.testing.assert_close(trace.q.mean, logits_of(model, batch.x).sigmoid(), rtol=1e-12, atol=0)


def test_noise_drives_units_to_0_and_1():
    """Mean |2 p - 1| of the units, 1 where all are decided; with noise 0 there is nothing that would decide them."""

    def decided(noise):
        found = resolved(
            shape=(7,),
            model={"latent_dim": 6, "encoder": {"name": "hash", "widths": [11], "noise": noise, "anneal_steps": 100}},
            pretrain={"optimizer": {"name": "adam", "lr": 0.01}, "epochs": 60, "batch_size": 64},
        )
        x, _ = rows(256)
        feed = feed_of(x)
        trainer = trainer_of(found, "pretrain", feed)
        trainer.run()
        return float((2 * logits_of(trainer.model, torch.from_numpy(x)).detach().sigmoid() - 1).abs().mean())

    with_noise, without = decided(4.0), decided(0.0)
    assert with_noise > 0.9
    assert with_noise > without + 0.1


@pytest.mark.parametrize(("options", "symbol"), [({"sampling": "gumbel"}, 1), ({"sampling": "gumbel", "levels": 3}, 3)])
def test_drawn_codes(options, symbol):
    found = found_of(**options)
    model, batch = fresh(found), batch_of()
    logits = logits_of(model, batch.x)
    with frozen(model), torch.no_grad():
        q = model.posterior(batch.x)
    expected = logits.sigmoid() if symbol == 1 else logits.unflatten(1, (2, 3)).softmax(2).flatten(1)
    torch.testing.assert_close(q.mean, expected.detach(), rtol=1e-12, atol=0)
    trace = model.train()(batch, step=torch.tensor(3))
    assert trace.draws.unique().tolist() == [0.0, 1.0]
    kl = part(Kl).build(found.shapes).penalty(trace)
    assert torch.equal(kl, trace.q.kl_to_uniform())
    assert found.encoder.cls.symbol(found.encoder.config) == symbol


COMPLAINTS = [
    ({"sampling": "gumbel", "noise": 2.0}, "noise = 2: has no effect with sampling: gumbel. Remove it, or set .*: noise."),
    ({"temperature": 0.5}, "temperature = 0.5: has no effect with sampling: noise. Remove it, or set .*: gumbel."),
    ({"levels": 3}, "levels = 3: noise makes bits, .* Set model.encoder.sampling: gumbel, or remove levels."),
    ({"levels": 4, "sampling": "gumbel"}, "levels = 4: does not divide model.latent_dim = 6. Make latent_dim a multiple of it"),
]


@pytest.mark.parametrize(("options", "message"), COMPLAINTS)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(RecipeError, match=f"model.encoder.{message}"):
        found_of(**options)


def test_kl_of_certain_bits_is_refused_with_a_cure_that_works():
    with pytest.raises(RecipeError, match=r"hash returns Point\. Take an encoder, or an option of it, that draws its codes"):
        resolved(model={"encoder": {"name": "hash"}, "regularizers": [{"name": "kl"}]})
    resolved(model={"encoder": {"name": "hash", "sampling": "gumbel"}, "regularizers": [{"name": "kl"}]})
