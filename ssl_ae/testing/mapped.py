"""Checks of the maps x -> q(z|x), z -> p(x|z) and z -> p(y|z)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, MultivariateNormal, Normal

from ssl_ae.checkpoint import read_weights, write_weights
from ssl_ae.latent import BernoulliCode, CategoricalCode, Point
from ssl_ae.likelihood import Levels
from ssl_ae.model import CODE, Model, frozen
from ssl_ae.randomness import seed_draws
from ssl_ae.testing.check import Check, Finding, check, require
from ssl_ae.testing.world import NAMES, Sample, Subject, World
from ssl_ae.trace import Pass, matches

BATCHES = (1, 2, 19)
MAPS = ("encoder", "decoder", "head", "table head")
POSTERIORS: dict[str, Callable[[Distribution], bool]] = {
    "point": lambda q: isinstance(q, Point),
    "diag": lambda q: isinstance(q, Independent) and isinstance(q.base_dist, Normal),
    "full": lambda q: isinstance(q, MultivariateNormal),
    "bernoulli": lambda q: isinstance(q, BernoulliCode),
    "categorical": lambda q: isinstance(q, CategoricalCode),
}
LIKELIHOODS: dict[str, Callable[[Distribution], bool]] = {
    "gaussian": lambda p: isinstance(p, Independent) and isinstance(p.base_dist, Normal),
    "bernoulli": lambda p: isinstance(p, Independent) and isinstance(p.base_dist, Bernoulli),
    "categorical": lambda p: isinstance(p, Levels),
}


def distribution(world: World, model: Model, sample: Sample, run: Pass | None = None) -> Distribution:
    """What the component under test returns for some rows."""
    if "head" in world.kind:
        return model.p_y(sample.z, sample.x)
    run = run or Pass(model.decoder)
    run.condition = condition_of(model, sample)
    q = model.encoder(run.tap(sample.x, "input"), run)  # a decoder may read the encoder's layers
    if world.kind == "encoder":
        return q
    answer = model.decoder(sample.z, run)
    require(isinstance(answer, tuple) and len(answer) == 2, f"forward returned {type(answer).__name__}, not a pair.")
    return answer[0]


def condition_of(model: Model, sample: Sample) -> Tensor | None:
    """The labels, (B, C), where one enters the model."""
    return nn.functional.one_hot(sample.y, len(NAMES["classes"])).to(sample.x.dtype) if model.conditional else None


def numbers(world: World, model: Model, sample: Sample) -> dict[str, Tensor]:
    """The distribution of each row as tensors, (B, ...)."""
    found = distribution(world, model, sample)
    if world.kind == "encoder":
        return {"mean": found.mean, "stddev": found.stddev}
    if world.kind == "decoder":
        return {"mean": found.mean, "log p(x|z)": found.log_prob(sample.x)}
    return {"logits" if world.task == "classes" else "mean": _center(found), "log p(y|z)": found.log_prob(sample.y)}


def _center(found: Distribution) -> Tensor:
    return found.logits if isinstance(found, Categorical) else found.mean


def alike(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of float32; impossible classes have logits of -inf."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5, equal_nan=True)


def _models(subject: Subject) -> Iterator[tuple[World, Model]]:
    """Every world with a model in evaluation mode, without gradients."""
    for world in subject.worlds:
        model = world.model()
        with frozen(model), torch.no_grad():
            yield world, model


@check(
    "encoder",
    rule="forward(x (B, *shapes.x), run) returns q(z|x) with batch shape (B,), event shape (K,) and finite mean for any B.",
    cure="flatten x from axis 1 and return ssl_ae.Point(code (B, K)), or what ssl_ae.Latent(width, shapes.latent, ...) gives.",
)
def codes(subject: Subject) -> None:
    for world, model in _models(subject):
        latent = world.resolved.shapes.latent
        for rows in BATCHES:
            q = distribution(world, model, world.sample(rows))
            _has_shape(world, "q(z|x)", q, rows, (latent,))
            draws = q.rsample(torch.Size([3]))
            require(draws.shape == (3, rows, latent), f"{world.name}: 3 draws have shape {tuple(draws.shape)}.")


@check(
    "encoder",
    rule="`posterior(config)` names the kind of q(z|x) that forward returns: point (Point), diag (Independent Normal), full "
    "(MultivariateNormal), bernoulli or categorical; where `symbol(config)` is given, codes are symbols of so many numbers.",
    cure="override the classmethod `posterior` to return what your options give (the default says point), and `symbol` only "
    "for discrete codes: 1 for bits, L for one-hot groups of L.",
)
def posterior(subject: Subject) -> None:
    for world, model in _models(subject):
        config = world.resolved.encoder.config
        said, symbol = subject.cls.posterior(config), subject.cls.symbol(config)
        q = distribution(world, model, world.sample(2))
        require(said in POSTERIORS, f"posterior(config) = {said!r}.")
        require(POSTERIORS[said](q), f"posterior(config) says {said!r}, but forward returned {type(q).__name__}.")
        if symbol is None:
            continue
        latent = q.mean.shape[1]
        require(latent % symbol == 0, f"{world.name}: symbol(config) = {symbol}, which does not divide K.")
        require(bool(((q.mean >= 0) & (q.mean <= 1)).all()), f"{world.name}: a code of symbols is not in [0, 1].")
        sums = q.mean.unflatten(1, (-1, symbol)).sum(2)
        require(symbol == 1 or alike(sums, torch.ones_like(sums)), f"{world.name}: the numbers of a symbol do not add up to 1.")


@check(
    "encoder",
    rule="where `conditional` is declared, a pass without run.condition gives ssl_ae.Point of features for q(y|x), (B, K), and "
    "another label gives another q(z|x, y); where it is not, run.condition changes nothing.",
    cure="return ssl_ae.Point(features) where run.condition is None, before the label is read; or remove `conditional`.",
)
def label(subject: Subject) -> None:
    for world, model in _models(subject):
        x, shapes = world.sample().x, world.resolved.shapes
        condition = torch.eye(shapes.classes)[world.sample().y]
        passes = [Pass(model.decoder, condition=given) for given in (None, condition, condition.roll(1, 1))]
        features, one, other = (model.encoder(run.tap(x, "input"), run) for run in passes)
        _has_shape(world, "features", features, len(x), (shapes.latent,))
        if model.encoder.conditional:
            require(isinstance(features, Point), f"{world.name}: without a label it is a {type(features).__name__}.")
        changed = not alike(one.mean, other.mean)
        require(changed == model.encoder.conditional, f"{world.name}: conditional = {model.encoder.conditional}.")


@check(
    "decoder",
    rule="forward(z (B, K), run) returns (p(x|z), guesses): batch shape (B,), event shape shapes.x, "
    "finite log_prob (B,), mean of x's shape; guesses is a dict of layers.",
    cure="return `self.output(raw), {}` with ssl_ae.Likelihood and raw (B, output.parameters_per_value, *shapes.x).",
)
def samples(subject: Subject) -> None:
    for world, model in _models(subject):
        shape = world.resolved.shapes.x
        for rows in BATCHES:
            sample, run = world.sample(rows), Pass(model.decoder)
            p = distribution(world, model, sample, run)
            _has_shape(world, "p(x|z)", p, rows, shape)
            value = p.log_prob(sample.x)
            require(value.shape == (rows,), f"{world.name}: log_prob(x) has shape {tuple(value.shape)} for {rows} rows.")
            require(bool(value.isfinite().all()), f"{world.name}: log_prob(x) of an x in [0, 1] is not finite.")
            guesses = model.decoder(sample.z, Pass(model.decoder, taps=_encoded(model, sample)))[1]
            fits = isinstance(guesses, dict) and all(len(guess) == rows for guess in guesses.values())
            require(fits, f"{world.name}: its guesses of layers are {type(guesses).__name__}, or not of {rows} rows.")


@check(
    "decoder",
    rule="`likelihood(config)` names the family of p(x|z): gaussian, bernoulli or categorical.",
    cure="override the classmethod `likelihood` to return what your options give; the default says gaussian.",
)
def likelihood(subject: Subject) -> None:
    for world, model in _models(subject):
        said = subject.cls.likelihood(world.resolved.decoder.config)
        p = distribution(world, model, world.sample(2))
        require(said in ("gaussian", "bernoulli", "categorical"), f"likelihood(config) = {said!r}.")
        require(LIKELIHOODS[said](p), f"likelihood(config) says {said!r}, but forward returned {p}.")


@check(
    "head",
    "table head",
    rule="features (B, K) -> Categorical over the classes, or Independent over the targets, event shape (T,); finite log_prob.",
    cure="return Categorical(logits=(B, shapes.classes)) or Independent(Normal(mean (B, shapes.targets), std), 1).",
)
def predictions(subject: Subject) -> None:
    for world, model in _models(subject):
        outputs = world.resolved.shapes.outputs
        for rows in BATCHES:
            sample = world.sample(rows)
            p = distribution(world, model, sample)
            wanted = Categorical if world.task == "classes" else Independent
            require(isinstance(p, wanted), f"{world.name}: returned {type(p).__name__}, expected {wanted.__name__}.")
            _has_shape(world, "p(y|z)", p, rows, () if world.task == "classes" else (outputs,))
            shape = tuple(_center(p).shape)
            require(shape == (rows, outputs), f"{world.name}: {outputs} outputs were asked for; {rows} rows gave {shape}.")
            require(bool(p.log_prob(sample.y).isfinite().all()), f"{world.name}: log_prob of a label is not finite.")


def _has_shape(world: World, name: str, found: Distribution, rows: int, event: tuple[int, ...]) -> None:
    require(isinstance(found, Distribution), f"{world.name}: returned {type(found).__name__} where {name} is expected.")
    batch, given = tuple(found.batch_shape), tuple(found.event_shape)
    require(
        batch == (rows,) and given == event,
        f"{world.name}: {name} of {rows} rows has batch shape {batch} and event shape {given}, expected {(rows,)} and {event}.",
    )
    center = _center(found)
    require(bool(center.isfinite().any()) and not bool(center.isnan().any()), f"{world.name}: the mean of {name} is not finite.")
    if not isinstance(found, Categorical):
        require(center.shape == (rows, *event), f"{world.name}: the mean of {name} has shape {tuple(center.shape)}.")


def _encoded(model: Model, sample: Sample) -> dict[str, Tensor]:
    run = Pass(model.decoder)
    model.encoder(run.tap(sample.x, "input"), run)
    return run.taps


@check(
    *MAPS,
    rule="in evaluation mode the same rows give the same answer: stored codes and head inputs are means, never draws.",
    cure="put randomness into the posterior or a regularizer, or behind `if self.training`.",
)
def deterministic(subject: Subject) -> None:
    for world, model in _models(subject):
        sample = world.sample()
        seed_draws(1)
        first = numbers(world, model, sample)
        seed_draws(2)
        second = numbers(world, model, sample)
        changed = [name for name in first if not torch.equal(first[name], second[name])]
        require(not changed, f"{world.name}: two passes over the same rows differ in {', '.join(changed)}.")


@check(
    *MAPS,
    rule="rows do not influence one another in evaluation mode: f(a ++ b) = f(a) ++ f(b); permuted rows give permuted answers.",
    cure="use statistics of the row alone, or running ones as BatchNorm does in evaluation mode; reduce over axes from 1 on.",
)
def row_law(subject: Subject) -> None:
    for world, model in _models(subject):
        sample, cut = world.sample(), 7
        whole = numbers(world, model, sample)
        parts = [numbers(world, model, part) for part in (sample[:cut], sample[cut:])]
        order = torch.randperm(len(sample))
        permuted = numbers(world, model, sample[order])
        for name, value in whole.items():
            same = alike(value, torch.cat([part[name] for part in parts]))
            require(same, f"{world.name}: {name} of {len(sample)} rows differs from that of {cut} and {len(sample) - cut} rows.")
            require(alike(value[order], permuted[name]), f"{world.name}: {name} changes with the order of the rows.")


@check(
    "encoder",
    "decoder",
    "head",
    rule="in a training step every parameter that requires a gradient gets a finite one (in an encoder that is differentiable).",
    cure="use each parameter in forward, do not detach, and drop or freeze (requires_grad_(False)) what is not trained.",
)
def gradients(subject: Subject) -> None:
    for world in subject.worlds:
        if subject.kind == "encoder" and not subject.cls.differentiable:
            continue
        model, sample = world.model(), world.sample()
        component = world.part(model)
        wanted = {name: p for name, p in component.named_parameters() if p.requires_grad}
        if not wanted:
            continue
        model.train()
        found = distribution(world, model, sample)
        if world.kind == "encoder":
            codes = [found, model.posterior(sample.x)] if model.encoder.conditional else [found]
            loss = sum((q.rsample() * torch.randn(len(sample), world.resolved.shapes.latent)).sum() for q in codes)
        else:
            loss = -found.log_prob(sample.x if world.kind == "decoder" else sample.y).sum()
        require(loss.requires_grad, f"{world.name}: its output does not depend on its parameters.")
        loss.backward()
        missed = [name for name, p in wanted.items() if p.grad is None]
        require(not missed, f"{world.name}: no gradient reached {', '.join(missed)}.")
        wild = [name for name, p in wanted.items() if not p.grad.isfinite().all()]
        require(not wild, f"{world.name}: the gradient of {', '.join(wild)} is not finite.")
        require(any(p.grad.any() for p in wanted.values()), f"{world.name}: every gradient is 0.")


@check(
    "encoder",
    "decoder",
    "head",
    rule="under bf16 autocast the answer stays finite.",
    cure="compute scales, exponentials and densities in float32: `h.float()` before them, as ssl_ae.Latent and Likelihood do.",
)
def bf16(subject: Subject) -> None:
    for world, model in _models(subject):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = numbers(world, model, world.sample())
        wild = [name for name, value in found.items() if not value.isfinite().all()]
        require(not wild, f"{world.name}: {', '.join(wild)} is not finite.")


@check(
    *MAPS,
    rule="the state_dict holds everything that was learnt: loaded into a fresh component it gives the same answer.",
    cure="keep what is learnt in parameters and buffers (register_buffer; in a table head `self.keep(name, tensor)`), "
    "not in attributes; build anything else from them when it is needed.",
)
def stored(subject: Subject) -> None:
    for world in subject.worlds:
        model, other, sample = world.model(), world.model(seed=1), world.sample()
        model.train()
        with torch.no_grad():
            numbers(world, model, sample)  # running statistics move
        if world.kind == "table head":
            other.head = world.resolved.head.build(world.resolved.shapes)  # a table head is loaded without having been fitted
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            write_weights(path, model.state_dict(), fingerprint="")
            other.load_state_dict(read_weights(path))
        with frozen(model), frozen(other), torch.no_grad():
            before, after = numbers(world, model, sample), numbers(world, other, sample)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        require(not changed, f"{world.name}: {', '.join(changed)} differs after saving and loading.")


class _Noise:
    """A regularizer's perturbation of one layer."""

    def __init__(self, layer: str) -> None:
        self.layers = (layer,)

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        return h + torch.randn(h.shape, generator=torch.Generator().manual_seed(3)).to(h.dtype)


@check(
    "encoder",
    "decoder",
    rule="layers go through `h = run.tap(h, name)`, each under its own name, and forward goes on with what tap returns.",
    cure="write `h = run.tap(layer(h), 'h1')` (decoders: 'd1', ...); the names input and code are the engine's.",
)
def taps(subject: Subject) -> None:
    for world, model in _models(subject):
        sample, run = world.sample(), Pass(model.decoder)
        before = _center(distribution(world, model, sample, run))
        theirs = set() if world.kind == "encoder" else set(_encoded(model, sample))
        names = [name for name in run.taps if name != "input" and name not in theirs]
        require(CODE not in names, f"{world.name}: it tapped {CODE!r}, a name of the engine's.")
        for name in names:
            noisy = Pass(model.decoder, [_Noise(name)])
            require(matches(name, (name,)), f"{world.name}: the layer's name {name!r} reads as a pattern.")
            after = _center(distribution(world, model, sample, noisy))
            if torch.equal(before, after):
                raise Finding(f"{world.name}: noise on layer {name!r} changed nothing, so forward ignores what tap returned.")


CHECKS: tuple[Check, ...] = (
    codes,
    posterior,
    label,
    samples,
    likelihood,
    predictions,
    deterministic,
    row_law,
    gradients,
    bf16,
    stored,
    taps,
)
