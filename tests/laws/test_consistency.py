"""Consistency with the averaged model: its value by hand, who its teacher is, and whose classes the alignment counts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_kit import assert_same, cut, feed_of, fresh, gradients, part, resolved, rows, trainer_of
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from ssl_ae_builtins.consistency import Consistency
from torch.distributions import Categorical

from ssl_ae import Batch, Shapes
from ssl_ae.data.card import Y as Labels
from ssl_ae.data.loading import Draw
from ssl_ae.errors import RecipeError
from ssl_ae.plan import labels_only

X, Y = rows(29, labeled=0.4)
NOISE = {"name": "gaussian_noise", "scale": 0.5}
CLASSES = 3


def built(**options):
    return part(Consistency, options=options).build(Shapes(x=(7,), latent=5, classes=CLASSES)).double()


def trace_of(own, teacher, uniform=None):
    """A trace with these logits, (B, C) each."""
    uniform = torch.ones(len(own), dtype=torch.bool) if uniform is None else uniform
    return SimpleNamespace(
        p_y=Categorical(logits=own, validate_args=False),
        teacher=SimpleNamespace(p_y=Categorical(logits=teacher, validate_args=False)),
        batch=SimpleNamespace(uniform=uniform),
    )


def logits(count, seed=0, scale=3.0):
    return scale * torch.randn(count, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- value


def test_the_value_is_the_cross_entropy_with_the_teacher_s_class_where_it_is_sure():
    """scikit-learn's log_loss of each row by itself."""
    own, teacher = logits(31), logits(31, seed=1)
    found = built(threshold=0.8).penalty(trace_of(own, teacher))
    p, theirs = own.softmax(1).numpy(), teacher.softmax(1).numpy()
    sure = theirs.max(1) >= 0.8
    assert 5 < sure.sum() < 26
    expected = [log_loss([c], row[None], labels=range(CLASSES)) for c, row in zip(theirs.argmax(1), p, strict=True)]
    np.testing.assert_allclose(found, np.where(sure, expected, 0.0), rtol=1e-10)


@pytest.mark.parametrize("sharpen", [1.0, 0.5])
def test_a_soft_target_is_the_teacher_s_distribution_sharpened(sharpen):
    """Temperature T raises p to 1/T: at T = 1/2, p^2 / sum p^2. The threshold is on p itself."""
    own, teacher = logits(31), logits(31, seed=1)
    found = built(threshold=0.8, target="soft", sharpen=sharpen).penalty(trace_of(own, teacher))
    p = teacher.softmax(1).numpy()
    q = p ** (1 / sharpen) / (p ** (1 / sharpen)).sum(1, keepdims=True)
    expected = -(q * np.log(own.softmax(1).numpy())).sum(1)
    np.testing.assert_allclose(found, np.where(p.max(1) >= 0.8, expected, 0.0), rtol=1e-10)


def test_a_teacher_that_is_nowhere_sure_teaches_nothing():
    own = logits(13).requires_grad_()
    value = built(threshold=0.95).penalty(trace_of(own, 0.1 * logits(13, seed=1)))
    value.sum().backward()
    assert torch.equal(value, torch.zeros(13, dtype=torch.float64))
    assert torch.equal(own.grad, torch.zeros_like(own))


# --- alignment


def test_a_teacher_of_the_running_mean_is_aligned_to_the_prior():
    """p prior / mean = prior where p = mean; and where the mean is the prior, p stays as it is."""
    prior = (0.5, 0.3, 0.2)
    own = logits(5)
    term = built(threshold=0.0, target="soft", align=True, prior=prior)
    term.mean.copy_(torch.tensor([0.1, 0.2, 0.7]))
    teacher = term.mean.log().expand(5, CLASSES)
    cross_entropy = -(torch.tensor(prior, dtype=torch.float64) * own.log_softmax(1)).sum(1)
    torch.testing.assert_close(term.penalty(trace_of(own, teacher)), cross_entropy, rtol=2e-5, atol=0)  # 1e-6 in the ratio
    unaligned = built(threshold=0.0, target="soft").penalty(trace_of(own, logits(5, seed=1)))
    fresh_one = built(threshold=0.0, target="soft", align=True)
    torch.testing.assert_close(fresh_one.penalty(trace_of(own, logits(5, seed=1))), unaligned, rtol=1e-12, atol=0)


def test_the_threshold_is_on_aligned_probabilities():
    """p prior / mean over its sum, by hand in numpy: a row counts where that is sure, whatever p was."""
    own, teacher, prior, mean = logits(31), logits(31, seed=1), np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7])
    term = built(threshold=0.8, align=True, prior=tuple(prior))
    term.mean.copy_(torch.from_numpy(mean))
    p = teacher.softmax(1).numpy()
    q = p * prior / mean
    q /= q.sum(1, keepdims=True)
    assert ((p.max(1) >= 0.8) != (q.max(1) >= 0.8)).sum() > 3
    expected = np.where(q.max(1) >= 0.8, -own.log_softmax(1).numpy()[np.arange(31), q.argmax(1)], 0.0)
    np.testing.assert_allclose(term.penalty(trace_of(own, teacher)), expected, rtol=1e-10)


def test_the_running_mean_follows_uniform_rows_of_whole_steps_in_training_alone():
    """m <- m + (mean of p_t - m) / 128 after each step, by hand; a row that is not finite is left out."""
    term, uniform = built(align=True), torch.arange(11) < 7
    teacher = logits(11)
    broken = torch.cat([teacher, torch.full((1, CLASSES), torch.nan)])
    expected = torch.full((CLASSES,), 1 / 3, dtype=torch.float64)
    for _ in range(3):
        before = term.mean.clone()
        term.penalty(trace_of(logits(4), teacher[:4], uniform[:4]))
        term.penalty(trace_of(logits(8), broken[4:], torch.cat([uniform[4:], torch.tensor([True])])))
        assert torch.equal(term.mean, before)  # until the step is over
        term.project(None)
        term.project(None)  # as after a step of another phase
        expected = expected + (teacher[:7].softmax(1).mean(0) - expected) / 128
        torch.testing.assert_close(term.mean, expected, rtol=1e-6, atol=0)  # the prior is kept in float32
    term.eval().penalty(trace_of(logits(11), teacher, uniform))
    term.project(None)
    torch.testing.assert_close(term.mean, expected, rtol=1e-6, atol=0)


def batch_of(count=29):
    uniform = torch.ones(count, dtype=torch.bool)
    uniform[torch.nonzero(torch.from_numpy(Y[:count]) >= 0)[:3, 0]] = False
    return Batch(x=torch.from_numpy(X[:count]), y=torch.from_numpy(Y[:count]), uniform=uniform)


@pytest.mark.parametrize("options", [{}, {"align": True, "target": "soft"}])
def test_a_step_in_parts_is_the_step(options):
    """Gradients of the second step, and the running mean, whichever way rows are cut."""
    found = resolved(
        model={"regularizers": [{"name": "consistency", "threshold": 0.34, **options}]}, finetune={"ema": 0.9, "alpha": 0.3}
    )
    states = []
    for groups in ([range(29)], [range(5), range(5, 6), range(6, 29)]):
        trainer = trainer_of(found, "joint", feed_of(X, Y))
        for _ in range(2):
            trainer.make_step(trainer.runs[0], cut(batch_of(), groups))
        states.append((gradients(trainer.model), dict(trainer.model.regularizers.named_buffers())))
    for a, b in zip(*states, strict=True):
        assert_same(a, b, atol=1e-12)


# --- in the engine


def test_the_student_sees_the_disturbed_row_and_the_teacher_the_row():
    """The term by its formula, from the average over the steps before at the row itself and the pass's own prediction."""
    found = resolved(
        model={"regularizers": [NOISE, {"name": "consistency", "threshold": 0.34}]},
        finetune={"ema": 0.5, "optimizer": {"name": "adam", "lr": 0.1}},
    )
    trainer, seen = trainer_of(found, "end-to-end", feed_of(X, Y)), []
    trainer.model.head.register_forward_hook(lambda module, given, out: seen.append(out.logits.detach()))
    run = trainer.runs[0]
    for _ in range(3):
        teacher = fresh(found).eval()
        teacher.load_state_dict(trainer.stepper.average.module.state_dict())
        seen.clear()
        run.shares.zero_()
        trainer.make_step(run, [batch_of()])
    theirs = teacher.predict(batch_of().x).logits
    sure = (theirs.exp().amax(1) >= 0.34) & batch_of().uniform
    expected = -seen[0].gather(1, theirs.argmax(1, keepdim=True))[:, 0][sure].sum() / 26  # 29 rows, of which 3 are extra
    assert float(run.shares[run.terms.index("consistency")]) == pytest.approx(float(expected), rel=1e-5)  # kept in float32
    assert sure.sum() >= 5
    assert not torch.allclose(teacher.predict(batch_of().x).logits, seen[0], atol=0.1)


@pytest.mark.parametrize("mode", ["joint", "alternate", "end-to-end"])
def test_unlabelled_rows_are_learned_from_in_every_mode(mode):
    """What a step of l_Y does changes with rows that nobody labelled; the baseline of the labels alone draws none of them."""
    found = resolved(model={"regularizers": [{"name": "consistency", "threshold": 0.34}]}, finetune={"ema": 0.9})
    trainer = trainer_of(found, mode, feed_of(X, Y))
    run = trainer.runs[-1]
    assert run.phase.draw.uniform > 0
    assert run.phase.draw.labeled > 0
    (batch,) = feed_of(X, Y).batches([(run.phase.draw, 0)])
    moved = []
    for change in (0.0, 1.0):
        trainer = trainer_of(found, mode, feed_of(X, Y))
        x = batch.x + change * (~batch.labeled)[:, None]
        trainer.make_step(trainer.runs[-1], [Batch(x=x, target=batch.x, y=batch.y, uniform=batch.uniform)])
        moved.append(gradients(trainer.model)["head.linear.weight"])
    assert not torch.allclose(*moved)
    plan = labels_only(found, fresh(found), 29, 11)
    assert plan.phases[0].draw == Draw(0, 8)
    assert [term.name for term in plan.phases[0].objective.terms] == ["supervised"]


# --- what is refused


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sharpen": 0.5}, r"consistency\.sharpen = 0\.5: has no effect on a class\. Set target: soft"),
        ({"prior": [0.5, 0.3, 0.2]}, r"consistency\.prior: has no effect without alignment\. Set align: true"),
        ({"align": True, "prior": [0.5, 0.5]}, r"consistency\.prior has 2 numbers, but there are 3 classes"),
        ({"align": True, "prior": [0.5, 0.3, 0.3]}, r"consistency\.prior: its numbers add up to 1\.1, not to 1"),
        ({"align": True, "prior": [0.5, 0.5, 0.0]}, r"prior\.2 = 0\.0: expected greater than 0"),
        ({"threshold": 1.0}, r"threshold = 1\.0: expected less than 1"),
    ],
)
def test_options_without_effect_or_sense_are_refused(options, complaint):
    with pytest.raises(RecipeError, match=complaint):
        resolved(model={"regularizers": [{"name": "consistency", **options}]}, finetune={"ema": 0.9})


def test_it_needs_classes_and_an_average():
    entry = {"regularizers": [{"name": "consistency"}]}
    with pytest.raises(RecipeError, match=r"needs a teacher, the averaged model\. Set finetune\.ema"):
        resolved(model=entry)
    with pytest.raises(RecipeError, match=r"consistency compares probabilities of classes, and kit has none"):
        resolved(
            y=Labels(task="regression", names=("u", "v")),
            model={**entry, "head": {"name": "gaussian"}},
            finetune={"ema": 0.9},
        )


# --- what is learnt

DISTORTION = {"name": "distortion", "rotation": 10, "translation": 0.5, "log_scale": 0.1, "shear": 5, "alpha": 4, "sigma": 2}
TERMS = {
    "consistency": [DISTORTION, {"name": "consistency", "threshold": 0, "target": "soft", "sharpen": 0.5, "align": True}],
    "vat": [{"name": "vat", "eps": 0.5}],
}


@pytest.mark.slow
@pytest.mark.parametrize("term", TERMS)
def test_unlabelled_digits_help_a_network_of_three_labels_a_class(term):
    """Accuracy on digits that nobody labelled, mean over two draws of the labels, against the same network without the term.

    The head of the recipe digits_consistency says what five draws of a longer training gave. Two points are asked for.
    """
    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    scores = {}
    for weight in (0.0, 1.0):
        regularizers = [*TERMS[term][:-1], {**TERMS[term][-1], "weight": weight}]
        found = resolved(
            (1, 8, 8),
            Labels(task="classes", names=tuple("0123456789")),
            model={"latent_dim": 64, "encoder": {"name": "mlp", "widths": [256]}, "regularizers": regularizers},
            finetune={"ema": 0.99, "epochs": 40, "batch_size": 128, "optimizer": {"name": "adamw", "lr": 2e-3}},
        )
        for seed in (0, 1):
            known = np.full(len(y), -1)
            order = np.random.default_rng(seed).permutation(len(y))
            chosen = np.concatenate([order[y[order] == c][:3] for c in range(10)])
            known[chosen] = y[chosen]
            trainer = trainer_of(found, "end-to-end", feed_of(x, known, dtype=torch.float32), fresh(found, dtype=torch.float32))
            trainer.run()
            with torch.no_grad():
                right = trainer.result.eval().predict(torch.from_numpy(x)).logits.argmax(1).numpy() == y
            scores.setdefault(weight, []).append(right[known < 0].mean())
    assert np.mean(scores[1.0]) > np.mean(scores[0.0]) + 0.02, scores
