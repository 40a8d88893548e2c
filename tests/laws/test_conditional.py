"""A label that enters encoder and decoder (M2): summed out it is the bound of Kingma et al. 2014, eq. 6 and 7."""

import math

import numpy as np
import pytest
import torch
from engine_kit import CLASSES, assert_same, feed_of, fresh, plan_of, resolved, rows, trainer_of, weights

from ssl_ae import Batch, Need, Pass
from ssl_ae.data.card import Y as Labels
from ssl_ae.errors import PluginError, RecipeError
from ssl_ae.model import frozen
from ssl_ae.objective import count_rows
from ssl_ae.trace import Over

D, K, N, ALPHA = 7, 5, 13, 0.5
X, Y = rows(N, labeled=0.5)
X = 1 / (1 + np.exp(-X))  # Bernoulli's range
BATCH = Batch(x=torch.from_numpy(X), y=torch.from_numpy(Y))
KNOWN = torch.from_numpy(Y >= 0)
ADAM = {"name": "adam", "lr": 0.01}
STEP = torch.zeros((), dtype=torch.int64)


def m2(latent=K, regularizers=("kl", "label_kl"), **more):
    model = {
        "latent_dim": latent,
        "encoder": {"name": "conditional_mlp", "widths": [11], "classifier": [3], "posterior": "diag"},
        "decoder": {"name": "conditional_mlp", "likelihood": "bernoulli"},
        "regularizers": [{"name": name} for name in regularizers],
        "head": {"name": "softmax"},
    }
    return resolved(
        model=model, finetune={"mode": "joint", "alpha": ALPHA, "optimizer": ADAM}, pretrain={"optimizer": ADAM}, **more
    )


def terms_of(found, model, mode="joint"):
    return {term.name: term for term in plan_of(found, model, mode, feed_of(X, Y)).phases[0].objective.terms}


def one_hot(label, rows=N):
    return torch.eye(CLASSES, dtype=torch.float64)[torch.as_tensor(label).expand(rows)]


def by_hand(model, trace):
    """-log p(x|z, c) at the trace's own draws and KL(q(z|x, c) || N(0, I)) for every row under every label, (C, N) each."""
    nats, divergences = [], []
    for c in range(CLASSES):
        q = model.encoder(BATCH.x, Pass(condition=one_hot(c)))
        z = trace.label_sum.trace.z[c * N : (c + 1) * N]
        logits = model.decoder(z, Pass(condition=one_hot(c)))[0].base_dist.logits
        nats.append(-(BATCH.x * logits - torch.log1p(logits.exp())).sum(1))
        mean, std = q.mean, q.stddev
        divergences.append((0.5 * (mean**2 + std**2 - 1) - std.log()).sum(1))
    return torch.stack(nats), torch.stack(divergences)


@pytest.fixture(scope="module")
def walked():
    found = m2()
    model = fresh(found)
    terms = terms_of(found, model)
    return model, terms, model(BATCH, frozenset().union(*(term.needs for term in terms.values())))


def test_of_an_unlabelled_row_the_label_is_summed_out(walked):
    """U(x) = sum_c q(c|x) (L(x, c) + log q(c|x)), L(x, c) = -log p(x|z, c) + KL - log 1/C: eq. 6 and 7, enumerated."""
    model, terms, trace = walked
    nats, divergences = by_hand(model, trace)
    hidden = torch.nn.functional.softplus(model.encoder.classifier.blocks[0][0](BATCH.x))
    probability = model.head.linear(model.encoder.features(hidden)).softmax(1).T  # (C, N)
    expected = (probability * (nats + divergences + math.log(CLASSES) + probability.log())).sum(0)
    total = sum(terms[name].value(trace) for name in ("reconstruction", "kl", "label_kl"))
    torch.testing.assert_close(total[~KNOWN], expected[~KNOWN], rtol=1e-10, atol=1e-10)


def test_of_a_labelled_row_it_is_the_bound_under_its_label(walked):
    """L(x, y), eq. 6."""
    model, terms, trace = walked
    nats, divergences = by_hand(model, trace)
    mine = torch.from_numpy(Y)[KNOWN]
    expected = (nats + divergences)[:, KNOWN].gather(0, mine[None])[0] + math.log(CLASSES)
    total = sum(terms[name].value(trace) for name in ("reconstruction", "kl", "label_kl"))
    torch.testing.assert_close(total[KNOWN], expected, rtol=1e-10, atol=1e-10)


def test_soft_labels_replace_the_label():
    found = m2()
    model, soft = fresh(found), torch.full((N, CLASSES), 1 / CLASSES).double()
    batch = Batch(x=BATCH.x, y=BATCH.y, soft=soft)
    weight = model(batch, frozenset({Need.LABEL_SUM})).label_sum.weight
    torch.testing.assert_close(weight[:, KNOWN], soft[KNOWN].T)


def test_alpha_multiplies_the_bound_and_not_l_y(walked):
    """J = l_Y + alpha (bound): the paper's factor of l_Y is 1 / alpha, means for sums."""
    _, terms, trace = walked
    assert {name: term.weight.value for name, term in terms.items()} == {
        "supervised": 1.0,
        **dict.fromkeys(("reconstruction", "kl", "label_kl"), ALPHA),
    }
    torch.testing.assert_close(terms["supervised"].value(trace)[KNOWN], -trace.p_y.log_prob(BATCH.y.clamp_min(0))[KNOWN])


@pytest.mark.parametrize(("labeled", "reached"), [(True, False), (False, True)])
def test_unlabelled_rows_teach_the_classifier(labeled, reached):
    """q(y|x) weighs the labels of rows that have none, and nothing of a row that has one (the paper's reason for l_Y)."""
    found = m2()
    model = fresh(found)
    batch = Batch(x=BATCH.x, y=torch.zeros(N, dtype=torch.int64) if labeled else None)
    objective = plan_of(found, model, "alternate", feed_of(X, Y)).phases[0].objective
    objective.weigh(objective.shares(model(batch, objective.needs), count_rows([batch])), STEP).backward()
    slopes = [
        model.head.linear.weight.grad,
        model.encoder.features.weight.grad,
        model.encoder.classifier.blocks[0][0].weight.grad,
    ]
    assert all((slope is not None and bool(slope.any())) == reached for slope in slopes)
    assert all(p.grad.any() for part in (model.encoder.layers, model.decoder) for p in part.parameters())


def test_the_gradient_is_that_of_the_whole_sum():
    """Of q(y|x) as weight and in its entropy: central differences of the bound at the same draws."""
    found = m2()
    model, objective = fresh(found), plan_of(found, fresh(found), "alternate", feed_of(X, Y)).phases[0].objective

    def loss():
        torch.manual_seed(0)
        batch = Batch(x=BATCH.x)
        return objective.weigh(objective.shares(model(batch, objective.needs), count_rows([batch])), STEP)

    (slope,) = torch.autograd.grad(loss(), model.head.linear.bias)
    step, found_slope = 1e-5, torch.zeros(CLASSES, dtype=torch.float64)
    with torch.no_grad():
        for c in range(CLASSES):
            for sign in (1, -1):
                model.head.linear.bias[c] += sign * step
                found_slope[c] += sign * loss() / (2 * step)
                model.head.linear.bias[c] -= sign * step
    torch.testing.assert_close(slope, found_slope, rtol=1e-6, atol=1e-8)


# --- a bound, and when it is tight


def log_likelihood(model, x, points=201, reach=8.0):
    """log p(x) = log 1/C sum_c integral N(z) p(x|z, c) dz for a code of one number, by the trapezoid rule, (N,)."""
    z = torch.linspace(-reach, reach, points, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    total = 0.0
    for c in range(CLASSES):
        logits = model.decoder(z[:, None], Pass(condition=one_hot(c, points)))[0].base_dist.logits
        likely = (x[:, None] * logits - torch.log1p(logits.exp())).sum(2).exp()  # (N, points)
        total = total + (likely * density).sum(1) / CLASSES
    return total.log()


def bound(found, model, x):
    terms = terms_of(found, model)
    trace = model(Batch(x=x), frozenset({Need.RECONSTRUCTION, Need.LABEL_SUM}))
    return -sum(terms[name].value(trace) for name in ("reconstruction", "kl", "label_kl"))


def test_it_bounds_log_p_of_x():
    found = m2(latent=1)
    model, x = fresh(found), torch.from_numpy((X > 0.5).astype(float))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
        torch.manual_seed(0)
        found_bound = torch.stack([bound(found, model, x) for _ in range(500)]).mean(0)
        exact = log_likelihood(model, x)
    assert (exact - found_bound > 0.01).all()
    assert (exact - found_bound < 2.0).all()  # and not for nothing


def test_it_is_tight_where_both_posteriors_are_exact():
    """p(x|z, y) that reads y alone: q(z|x, y) = N(0, 1) and q(y|x) = p(x|y) / sum_c p(x|c) leave no gap, whatever the draw."""
    found = m2(latent=1)
    model, x = fresh(found), torch.from_numpy((X[:1] > 0.5).astype(float)).expand(N, D)
    with torch.no_grad():
        model.decoder.layers.blocks[0][0].weight[:, 0] = 0.0  # of z
        model.encoder.latent.linear.weight.zero_()
        model.encoder.latent.linear.bias.copy_(torch.tensor([0.0, math.log(math.expm1(1 - 1e-5))]))  # softplus(.) + 1e-5 = 1
        logits = torch.stack([model.decoder(x[:1, :1], Pass(condition=one_hot(c, 1)))[0].log_prob(x[:1]) for c in range(CLASSES)])
        model.head.linear.weight.zero_()
        model.head.linear.bias.copy_(logits[:, 0])
        torch.testing.assert_close(bound(found, model, x), log_likelihood(model, x), rtol=1e-9, atol=1e-9)


# --- the engine


def test_where_no_label_enters_nothing_is_summed():
    found = resolved(model={"encoder": {"name": "mlp", "widths": [11], "posterior": "diag"}, "regularizers": [{"name": "kl"}]})
    model = fresh(found)
    torch.manual_seed(0)
    trace = model(Batch(x=BATCH.x), frozenset({Need.RECONSTRUCTION, Need.LABEL_SUM}))
    torch.manual_seed(0)
    plain = model(Batch(x=BATCH.x), frozenset({Need.RECONSTRUCTION}))
    assert trace.label_sum is None
    assert torch.equal(trace.p_x.mean, plain.p_x.mean)


def test_every_label_meets_the_same_noise():
    """The input is disturbed once, so that labels differ in nothing else."""
    found = m2(regularizers=("kl", "gaussian_noise"))
    seen = fresh(found)(BATCH, frozenset({Need.LABEL_SUM})).label_sum.trace.taps["input"].unflatten(0, (CLASSES, N))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], BATCH.x)


def test_features_and_predictions_know_no_label():
    model = fresh(m2())
    with frozen(model):
        p_y = model.predict(BATCH.x)
        trace = model(BATCH, frozenset({Need.PREDICTION}))
        assert torch.equal(trace.p_y.logits, p_y.logits)
        assert torch.equal(model.features(BATCH.x), trace.q.mean)
        assert trace.label_sum is None


def test_a_sample_is_rebuilt_under_its_likeliest_label():
    model = fresh(m2())
    with frozen(model), torch.no_grad():
        label = one_hot(model.predict(BATCH.x).logits.argmax(1))
        code = model.encoder(BATCH.x, Pass(condition=label)).mean
        expected = model.decoder(code, Pass(condition=label))[0].mean
        torch.testing.assert_close(model.reconstruct(BATCH.x).mean, expected)
        assert torch.equal(model.layer(BATCH.x, "code"), code)
        shown = model(BATCH, frozenset({Need.RECONSTRUCTION}))
        torch.testing.assert_close(shown.q.mean[~KNOWN], code[~KNOWN])  # a known label is the likeliest


def test_codes_alone_take_the_labels_in_turn():
    model, z = fresh(m2()), torch.randn(N, K, dtype=torch.float64)
    given = model.decode(z, one_hot(torch.arange(N) % CLASSES)).mean
    assert torch.equal(model.decode(z).mean, given)
    assert not torch.allclose(model.decode(z, one_hot(0)).mean, given)


@pytest.mark.parametrize("mode", ["pretrain", "joint", "alternate", "end-to-end"])
def test_every_mode_trains(mode):
    """Without a head, in pretraining, every label is as likely as any other."""
    found = m2()
    feed = feed_of(X, None if mode == "pretrain" else Y)
    model = fresh(found, head=mode != "pretrain")
    before = weights(model)
    trainer = trainer_of(found, mode, feed, model)
    trainer.run()
    moved = {name.split(".")[1] for name, value in weights(model).items() if not torch.equal(value, before[name])}
    wanted = {"pretrain": {"layers", "latent"}, "end-to-end": {"classifier", "features", "linear"}}
    assert wanted.get(mode, {"layers", "latent", "classifier", "features", "linear"}) <= moved


def test_micro_batches_do_not_matter():
    found = m2(regularizers=("label_kl",))
    model, needs = fresh(found), frozenset({Need.LABEL_SUM})
    term = terms_of(found, model)["label_kl"]
    halves = [Batch(x=BATCH.x[i::2], y=BATCH.y[i::2]) for i in range(2)]
    counts = count_rows(halves)
    torch.testing.assert_close(
        sum(term.share(model(half, needs), counts) for half in halves), term.share(model(BATCH, needs), count_rows([BATCH]))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": {"name": "mlp"}}, "leaves the label to the decoder, but builtins/mlp"),
        ({"encoder": {"name": "mlp"}, "decoder": {"name": "mlp"}, "regularizers": [{"name": "label_kl"}]}, "no label enters"),
        ({"encoder": {"name": "conditional_mlp", "posterior": "point"}, "regularizers": [{"name": "kl"}]}, "returns Point"),
    ],
)
def test_what_does_not_go_together_is_told_before_the_first_step(change, message):
    model = {"encoder": {"name": "conditional_mlp"}, "decoder": {"name": "conditional_mlp"}, "head": {"name": "softmax"}}
    with pytest.raises(RecipeError, match=message):
        resolved(model=model | change)


def test_a_data_set_without_classes_has_no_label_to_give():
    with pytest.raises(RecipeError, match="kit has no classes"):
        m2(y=Labels(task="regression", names=("u", "v")))


def test_a_sum_over_labels_is_of_rows():
    with pytest.raises(PluginError, match=r"Set over = Over\.ROWS"):
        type("Wrong", (m2().regularizers[0].cls,), {"name": "wrong", "over": Over.STEP})


def test_a_decoder_alone_may_read_the_label():
    """Any encoder beside it: then the head reads E[z|x]."""
    model = {"encoder": {"name": "mlp", "widths": [11]}, "decoder": {"name": "conditional_mlp"}, "head": {"name": "softmax"}}
    found = fresh(resolved(model=model))
    trace = found(BATCH, frozenset({Need.LABEL_SUM, Need.RECONSTRUCTION, Need.PREDICTION}))
    assert trace.label_sum.weight.shape == (CLASSES, N)
    assert_same({"z": trace.q.mean}, {"z": found.features(BATCH.x)})
