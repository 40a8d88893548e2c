"""What a term may ask of the forward pass, each checked against the model run by hand."""

import pytest
import torch
from engine_kit import Contraction, assert_same, feed_of, fresh, gradients, resolved, rows, trainer_of, weights
from torch.func import functional_call, jacrev, vmap

import ssl_ae
from ssl_ae import Batch, Need, Over
from ssl_ae.model import frozen

X, Y = rows(13)
NOISE = {"name": "gaussian_noise", "scale": 0.5}


def batch_of():
    return Batch(x=torch.from_numpy(X), y=torch.from_numpy(Y))


def noisy_model(**model):
    return fresh(resolved(model={"regularizers": [NOISE, {"name": "dropout", "rate": 0.5}], **model}))


def quiet(model):
    """The layers of the same weights without noise."""
    with frozen(model):
        return model(batch_of()).taps


def test_nobody_pays_for_what_no_term_needs():
    trace = noisy_model()(batch_of())
    assert (trace.p_x, trace.p_y, trace.view, trace.teacher, trace.step_mean) == (None,) * 5
    assert not trace.clean
    assert not trace.rebuilt
    assert not trace.batch.x.requires_grad


def test_clean_taps_are_the_unperturbed_layers():
    model = noisy_model()
    trace, expected = model(batch_of(), frozenset({Need.CLEAN})), quiet(model)
    assert torch.equal(trace.clean["input"], batch_of().x)
    for name in ("h1", "code"):
        assert torch.equal(trace.clean[name], expected[name])
        assert not torch.equal(trace.taps[name], expected[name])


def test_the_code_of_a_clean_pass_is_the_mean():
    encoder = {"name": "mlp", "widths": [11], "posterior": "diag"}
    model = fresh(resolved(model={"encoder": encoder}))
    trace = model(batch_of(), frozenset({Need.CLEAN}))
    assert torch.equal(trace.clean["code"], trace.q.mean)
    assert not torch.equal(trace.z, trace.q.mean)


def test_draws():
    encoder = {"name": "mlp", "widths": [11], "posterior": "diag"}
    model = fresh(resolved(model={"encoder": encoder, "samples": 3}))
    trace = model(batch_of(), frozenset({Need.RECONSTRUCTION, Need.PREDICTION}))
    assert trace.draws.shape == (3, 13, 5)
    assert torch.equal(trace.z, trace.draws[0])
    assert torch.equal(trace.taps["code"], trace.z)
    assert torch.equal(trace.p_x.mean, trace.decode(trace.z).mean)
    assert torch.equal(trace.p_y.logits, model.head(trace.q.mean).logits)  # heads see the mean, never a draw


def test_l_x_is_the_mean_over_draws():
    from ssl_ae.objective import reconstruction

    encoder = {"name": "mlp", "widths": [11], "posterior": "diag"}
    model = fresh(resolved(model={"encoder": encoder, "samples": 3}))
    trace = model(batch_of(), frozenset({Need.RECONSTRUCTION}))
    expected = torch.stack([-model.decode(z).log_prob(batch_of().x) for z in trace.draws]).mean(0)
    torch.testing.assert_close(reconstruction(trace), expected, rtol=1e-12, atol=0)


# --- INPUT_GRAD


class Features(torch.nn.Module):
    """The encoder's mean as a function of its parameters and x."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.features(x)


def test_a_penalty_of_the_input_gradient_is_the_jacobian():
    found = resolved(extra=[(Contraction,)])
    model = fresh(found)
    features, x = Features(model), torch.from_numpy(X)
    jacobian = vmap(jacrev(lambda row: functional_call(features, dict(features.named_parameters()), (row[None],))[0]))(x)
    value = model.regularizers[0].penalty(model(batch_of(), frozenset({Need.INPUT_GRAD})))
    torch.testing.assert_close(value, jacobian.square().flatten(1).sum(1), rtol=1e-10, atol=0)


def test_its_gradient_reaches_the_weights():
    """One SGD step with the penalty alone moves each weight by -lr times the derivative by torch.func."""
    found = resolved(extra=[(Contraction, 3.0)])
    model = fresh(found)
    trainer, plain = trainer_of(found, "pretrain", feed_of(X), model), trainer_of(resolved(), "pretrain", feed_of(X))
    for each in (trainer, plain):
        each.make_step(each.runs[0], [batch_of()])
    features = Features(fresh(found))
    parameters = dict(features.named_parameters())

    def penalty(parameters):
        jacobian = vmap(jacrev(lambda row: functional_call(features, parameters, (row[None],))[0]))(torch.from_numpy(X))
        return 3.0 * jacobian.square().flatten(1).sum(1).mean()

    expected = torch.func.grad(penalty)(parameters)
    base = gradients(plain.model)
    for name, g in gradients(trainer.model).items():
        torch.testing.assert_close(g, base[name] + expected[f"model.{name}"], rtol=1e-8, atol=1e-12)


# --- VIEW, TEACHER


def test_a_view_is_a_second_pass_with_its_own_noise():
    trace = noisy_model()(batch_of(), frozenset({Need.VIEW, Need.PREDICTION, Need.RECONSTRUCTION}))
    for name in ("input", "h1", "code"):
        assert not torch.equal(trace.view.taps[name], trace.taps[name])
    assert torch.equal(trace.view.batch.x, trace.batch.x)
    assert trace.view.p_y.logits.requires_grad
    assert trace.view.p_x is None  # l_X is of the first pass


def test_views_without_noise_agree():
    trace = fresh(resolved())(batch_of(), frozenset({Need.VIEW}))
    assert torch.equal(trace.view.q.mean, trace.q.mean)


class Consistency(ssl_ae.Regularizer):
    """Squared distance to the teacher's probabilities (Tarvainen & Valpola 2017)."""

    name = "consistency"
    needs = frozenset({Need.TEACHER, Need.PREDICTION})
    seen = ()

    def penalty(self, trace):
        Consistency.seen = (*Consistency.seen, trace.teacher)
        return (trace.p_y.probs - trace.teacher.p_y.probs).square().sum(1)


def test_the_teacher_is_the_averaged_model_without_noise_or_gradient():
    Consistency.seen = ()
    found = resolved(model={"regularizers": [NOISE]}, extra=[(Consistency,)], finetune={"ema": 0.8})
    trainer = trainer_of(found, "joint", feed_of(X, Y))
    for _ in range(3):
        before = weights(trainer.stepper.average.module)
        trainer.make_step(trainer.runs[0], [batch_of()])
    teacher = Consistency.seen[-1]
    assert not teacher.p_y.logits.requires_grad
    by_hand = fresh(found).eval()
    by_hand.load_state_dict(before)
    assert torch.equal(teacher.p_y.logits, by_hand.predict(batch_of().x).logits)
    assert not any(name.startswith("_teacher") for name, _ in trainer.runs[0].step.named_parameters())
    assert trainer.stepper.average.module.training == trainer.model.training  # its mode is given back


def test_penalties_of_predictions_stand_beside_l_y():
    """alpha multiplies the reconstruction side alone."""
    found = resolved(extra=[(Consistency, 0.5)], finetune={"ema": 0.8, "alpha": 0.1})
    factors = {t.name: t.weight.value for t in trainer_of(found, "joint", feed_of(X, Y)).runs[0].phase.objective.terms}
    assert factors == {"supervised": 1.0, "reconstruction": 0.1, "consistency": 0.5}
    assert [t.name for t in trainer_of(found, "end-to-end", feed_of(X, Y)).runs[0].phase.objective.terms] == [
        "supervised",
        "consistency",
    ]


# --- predict


def test_predict_uses_frozen_statistics_and_is_differentiable():
    """With batch-norm: the running statistics neither move nor depend on the company of a row; the mode is given back."""
    encoder = {"name": "mlp", "widths": [11], "activation": "tanh", "batch_norm": True}
    model = noisy_model(encoder=encoder)
    for _ in range(3):
        model(batch_of())
    before = weights(model)
    x = batch_of().x.requires_grad_()
    p = model.predict(x)
    assert model.training
    assert all(module.training for module in model.modules())
    assert_same(weights(model), before)
    torch.testing.assert_close(model.predict(x[:1]).logits, p.logits[:1], rtol=1e-12, atol=1e-14)
    model.eval()
    assert torch.equal(p.logits, model.head(model.features(x)).logits)
    direction = torch.randn_like(x)
    loss = p.logits[:, 0].sum()
    (slope,) = torch.autograd.grad(loss, x)
    step = 1e-6
    numeric = (
        model.predict(x + step * direction).logits[:, 0].sum() - model.predict(x - step * direction).logits[:, 0].sum()
    ) / (2 * step)
    assert float((slope * direction).sum()) == pytest.approx(float(numeric.detach()), rel=1e-6)


def test_step_mean_is_of_this_step():
    """In one part, the mean of the batch's uniform rows; the term sees the same through the trainer."""
    seen = []

    class Seen(ssl_ae.Regularizer):
        name, over, needs = "seen", Over.STEP, frozenset({Need.STEP_MEAN})

        def penalty(self, trace):
            seen.append((trace.step_mean(trace.q.mean).detach(), trace.q.mean[trace.batch.uniform].mean(0).detach()))
            return trace.q.mean.sum() * 0

    trainer = trainer_of(resolved(extra=[(Seen,)]), "joint", feed_of(X, Y))
    trainer.run()
    assert seen
    for found, expected in seen:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
