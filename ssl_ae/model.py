"""encoder -> q(z|x) -> code -> decoder -> p(x|z), and a head on the code: one forward pass becomes a Trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from ssl_ae.components import Decoder, Encoder, Head, Regularizer, TableHead
from ssl_ae.errors import RecipeError, listing
from ssl_ae.latent import Point
from ssl_ae.resolve import Resolved
from ssl_ae.trace import Batch, LabelSum, Need, Pass, Shapes, Trace, matches, once_each

CODE = "code"  # the name under which the drawn code is tapped

Means = Callable[[Tensor, Tensor], Tensor]  # values (B, *s), uniform (B,) bool -> their mean over the step, (*s)


class Model(nn.Module):
    """Nothing in here knows a technique: it runs what the components are and gathers what the terms need."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None = None,
        head: Head | TableHead | None = None,
        regularizers: Sequence[Regularizer] = (),
        samples: int = 1,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = encoder, decoder, head
        self.regularizers = nn.ModuleList(regularizers)
        self.samples = samples

    def forward(
        self,
        batch: Batch,
        needs: frozenset[Need] = frozenset(),
        means: Means | None = None,
        teacher: Model | None = None,
        step: Tensor | None = None,
    ) -> Trace:
        """One pass over a batch, with every further pass that a term needs. Raises ValueError for a layer tapped twice.

        `step`, () int64, is the number of steps made before this one; None outside training.
        """
        if Need.GUESS in needs and batch.guess is None:  # of validation rows nobody has guessed
            batch = replace(batch, guess=batch.x.new_zeros(len(batch), self.head.shapes.outputs))
        watched = replace(batch, x=batch.x.detach().requires_grad_()) if Need.INPUT_GRAD in needs else batch
        perturbers, quiet = self._perturbers(), self._perturbers(always=True)
        undisturbed = perturbers == quiet and (step is None or not self.encoder.noisy)
        learn = undisturbed or Need.CLEAN not in needs
        of_rows = needs - {Need.RECONSTRUCTION} if self.conditional else needs
        trace = self._walk(watched, perturbers, of_rows, means, learn, step)
        further: dict[str, object] = {}
        if self.conditional:
            further |= self._under_labels(trace, perturbers, needs, learn, step)
        if Need.CLEAN in needs and not undisturbed:
            clean = Pass(self.decoder, quiet, labeled=batch.labeled, uniform=batch.uniform)
            q = self.encoder(clean.tap(batch.x, "input"), clean)
            further |= {"clean": clean.taps | {CODE: q.mean}, "clean_stats": clean.stats}
        if Need.VIEW in needs:
            further["view"] = self._walk(batch, perturbers, needs - {Need.RECONSTRUCTION}, means, learn=False, step=step)
        if Need.TEACHER in needs:
            with torch.no_grad(), frozen(teacher):
                further["teacher"] = teacher._walk(batch, teacher._perturbers(always=True), frozenset({Need.PREDICTION}))
        return replace(trace, **further) if further else trace

    @property
    def conditional(self) -> bool:
        """Whether a label enters encoder or decoder."""
        return self.encoder.conditional or (self.decoder is not None and self.decoder.conditional)

    def features(self, x: Tensor) -> Tensor:
        """E[z|x], (B, K): what is stored and what heads see. Deterministic in evaluation mode."""
        return self.posterior(x).mean

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Distribution:
        """z (B, K) -> p(x|z). Where a label enters and none is given, rows take the labels in turn.

        Raises RecipeError where the decoder needs the layers that a code alone does not bring.
        """
        if self.decoder.reads_layers:
            raise RecipeError(
                f"decoder {self.decoder.name} reads the layers of the encoder beside the code, so it reconstructs samples but "
                "decodes no code of its own. Take a decoder that reads the code alone, such as mlp."
            )
        if self.conditional and condition is None:
            classes = self.encoder.shapes.classes
            condition = torch.eye(classes, dtype=z.dtype, device=z.device)[torch.arange(len(z), device=z.device) % classes]
        return self.decoder(z, Pass(self.decoder, condition=condition))[0]

    def reconstruct(self, x: Tensor) -> Distribution:
        """p(x|z) at z = E[z|x], without noise."""
        return self.round_trip(x)[1]

    def round_trip(self, x: Tensor) -> tuple[Distribution, Distribution]:
        """q(z|x), and p(x|z) at its mean, in one pass without noise: the decoder may read the encoder's layers.

        Where a label enters, p(x|z, y) at E[z|x, y] of the likeliest label.
        """
        run = Pass(self.decoder, self._perturbers(always=True))
        q = self.encoder(run.tap(x, "input"), run)
        mean = q.mean
        if self.conditional:
            run = self._likeliest(run, q, x)
            mean = self.encoder(run.taps["input"], run).mean
        return q, self.decoder(run.tap(mean, CODE), run)[0]

    def layer(self, x: Tensor, name: str) -> Tensor:
        """A layer by its name, (B, *s), in a pass without noise and with the code at its mean. Raises KeyError."""
        run = Pass(self.decoder, self._perturbers(always=True))
        q = self.encoder(run.tap(x, "input"), run)
        if self.conditional and name not in run.taps:
            run = self._likeliest(run, q, x)
            q = self.encoder(run.taps["input"], run)
        run.tap(q.mean, CODE)
        if name not in run.taps:
            self.decoder(run.taps[CODE], run)
        return run.taps[name]

    def predict(self, x: Tensor) -> Distribution:
        """p(y|x) without noise, with frozen statistics; differentiable in x."""
        with frozen(self):
            return self.p_y(self.features(x), x)

    def p_y(self, z: Tensor, x: Tensor) -> Distribution:
        """p(y|z) of the head for codes z (B, K), or p(y|z, x) where it reads samples x (B, *s) too."""
        return self.head(z, x.flatten(1)) if self.head.reads_samples else self.head(z)

    def posterior(self, x: Tensor) -> Distribution:
        """q(z|x) without noise, batch shape (B,), event shape (K,). Deterministic in evaluation mode."""
        run = Pass(self.decoder, self._perturbers(always=True))
        return self.encoder(run.tap(x, "input"), run)

    def disturbed(self, x: Tensor) -> Tensor:
        """x as a training pass gives it to the encoder: through every regularizer that perturbs the input, in their order."""
        return Pass(regularizers=[r for r in self.regularizers if "perturb" in r.verbs]).tap(x, "input")

    def _perturbers(self, always: bool = False) -> list[Regularizer]:
        """Those that perturb now: all of them while training, else only those that change what the input is."""
        return [r for r in self.regularizers if "perturb" in r.verbs and (r.always or (self.training and not always))]

    def encode(self, x: Tensor) -> Distribution:
        """q(z|x) without noise, with frozen statistics; differentiable in x."""
        with frozen(self):
            return self.posterior(x)

    def _likeliest(self, run: Pass, q: Distribution, x: Tensor) -> Pass:
        """The pass to go on with, under the likeliest label by the features q of x."""
        seen = run.taps["input"]
        weight = label_weights(Batch(seen), self._guess(q, x), self.encoder.shapes.classes)
        label = nn.functional.one_hot(weight.argmax(1), weight.shape[1]).to(weight.dtype)
        return Pass(self.decoder, run.regularizers, {"input": seen}, condition=label)

    def _guess(self, q: Distribution, x: Tensor) -> Distribution | None:
        """q(y|x), where there is a head."""
        return None if self.head is None else self.p_y(q.mean, x)

    def _under_labels(
        self, trace: Trace, perturbers: Sequence[Regularizer], needs: frozenset[Need], learn: bool, step: Tensor | None
    ) -> dict[str, object]:
        """What the walk without a label leaves open: the rows under each label, or under the likeliest where no term sums."""
        batch, seen, decoded = trace.batch, trace.taps["input"], needs & {Need.RECONSTRUCTION}
        if not needs & {Need.RECONSTRUCTION, Need.LABEL_SUM}:
            return {}
        p_y = self._guess(trace.q, batch.x) if trace.p_y is None else trace.p_y
        weight = label_weights(batch, p_y, self.encoder.shapes.classes)
        classes = weight.shape[1]
        one_hot = torch.eye(classes, dtype=weight.dtype, device=weight.device)
        if Need.LABEL_SUM not in needs:
            label = one_hot[weight.argmax(1)]
            one = self._walk(batch, perturbers, decoded, None, learn, step, label, seen)
            return {"q": one.q, "draws": one.draws, "p_x": one.p_x, "taps": {**trace.taps, **one.taps}, "rebuilt": one.rebuilt}
        label = one_hot.repeat_interleave(len(batch), 0)
        each = self._walk(batch.repeated(classes), perturbers, decoded, None, learn, step, label, once_each(seen, classes))
        if p_y is not None:
            each = replace(each, p_y=Categorical(logits=once_each(p_y.logits, classes), validate_args=False))
        return {"label_sum": LabelSum(each, weight.T)}

    def _walk(
        self,
        batch: Batch,
        perturbers: Sequence[Regularizer],
        needs: frozenset[Need],
        means: Means | None = None,
        learn: bool = True,
        step: Tensor | None = None,
        condition: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Trace:
        """`seen` is x with its noise, where an earlier walk has disturbed it."""
        sides = {"labeled": batch.labeled, "uniform": batch.uniform, "step": step}
        run = Pass(self.decoder, perturbers, condition=condition, learn=learn, **sides)
        q = self.encoder(run.tap(batch.x, "input") if seen is None else run.taps.setdefault("input", seen), run)
        encoded = dict(run.taps)
        first, *others = q.rsample(torch.Size([self.samples])) if self.samples > 1 else [q.rsample()]
        first = run.tap(first, CODE)
        draws = torch.stack([first, *others])  # (S, B, K)
        run.learn = True  # the decoder meets these rows in no other pass
        p_x, rebuilt = self.decoder(first, run) if Need.RECONSTRUCTION in needs else (None, {})
        p_y = self.p_y(q.mean, batch.x) if Need.PREDICTION in needs else None

        def decode(z: Tensor, given: Tensor | None = None) -> Distribution:
            label = condition if given is None else given
            again = Pass(self.decoder, perturbers, dict(encoded), condition=label, stats=run.stats, learn=False, **sides)
            return self.decoder(z, again)[0]

        def step_mean(value: Tensor) -> Tensor:
            return means(value, batch.uniform)

        return Trace(
            model=self,
            batch=batch,
            q=q,
            draws=draws,
            p_x=p_x,
            p_y=p_y,
            taps=run.taps,
            # the pass itself, where nothing disturbs it; else `forward` makes another
            clean=encoded | {CODE: q.mean} if Need.CLEAN in needs else {},
            clean_stats=run.stats if Need.CLEAN in needs else {},
            rebuilt=rebuilt,
            decode=decode,
            encode=self.encode,
            predict=self.predict,
            step_mean=step_mean if means is not None else None,
        )


def label_weights(batch: Batch, p_y: Distribution | None, classes: int) -> Tensor:
    """(B, C) how likely each label is: certain where it is known (or the row's soft one), else q(y|x); alike without a head."""
    guess = batch.x.new_full((len(batch), classes), 1 / classes) if p_y is None else p_y.logits.exp()  # they are normalised
    known = nn.functional.one_hot(batch.y.clamp_min(0), classes) if batch.soft is None else batch.soft
    return torch.where(batch.labeled[:, None], known.to(guess.dtype), guess)


class Slice(Model):
    """Part `index` of a model, trained on what the parts below it give: a slice of a model is a model.

    The parts below are frozen and undisturbed, and none of the slice's parameters is theirs (Vincent et al. 2010, sec. 3.5).
    """

    def __init__(self, whole: Model, index: int) -> None:
        parts, regularizers = whole.encoder.slices(), list(whole.regularizers)
        here = [r for r in regularizers if index == 0 or not r.of_samples]
        super().__init__(parts[index], whole.decoder.slices()[-1 - index], regularizers=here)
        # in tuples, so that they are no modules of the slice
        self._below = tuple(parts[:index])
        self._before = tuple(r for r in regularizers if r.of_samples and r.always)

    def forward(self, batch: Batch, *args, **kwargs) -> Trace:
        """As `Model.forward`, on the rows as the parts below see them."""
        if self._below:
            batch = replace(batch, x=self.below(batch.x), target=self.below(batch.target))
        return super().forward(batch, *args, **kwargs)

    @torch.no_grad()
    def below(self, x: Tensor) -> Tensor:
        """What the parts below return for x."""
        x = Pass(regularizers=self._before).tap(x, "input")
        for part in self._below:
            with frozen(part):
                x = part(x, Pass()).mean
        return x


class Stored(Encoder):
    """The encoder of rows that are codes already: a model over stored latents is a model."""

    name = "stored"

    def forward(self, x: Tensor, run: Pass) -> Point:
        """x (B, K) -> Point(x)."""
        return Point(x)


def build(resolved: Resolved, head: bool) -> Model:
    """Fresh weights from torch's current generator. Encoder and decoder come first, so a head never changes them."""
    shapes = resolved.shapes
    return Model(
        encoder=resolved.encoder.build(shapes),
        decoder=resolved.decoder.build(shapes),
        regularizers=[part.build(shapes) for part in resolved.regularizers],
        head=resolved.head.build(shapes) if head else None,
        samples=resolved.recipe.model.samples,
    )


def layers_of(model: Model, shapes: Shapes) -> list[str]:
    """Names of the layers that a pass through the model taps."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), frozen(model):
        like = next(model.parameters())
        return list(model(Batch(like.new_zeros(2, *shapes.x)), frozenset({Need.RECONSTRUCTION})).taps)


def check_layers(model: Model, shapes: Shapes) -> None:
    """Raises RecipeError for a regularizer on layers that the model does not have: it would do nothing, and nobody would know."""
    # without its head, which may have to be fitted before it is asked
    below = Model(model.encoder, model.decoder, regularizers=model.regularizers)
    layers = layers_of(below, shapes)
    for i, regularizer in enumerate(model.regularizers):
        if not any(matches(layer, regularizer.layers) for layer in layers):
            raise RecipeError(
                f"model.regularizers.{i} ({regularizer.name}).layers = {list(regularizer.layers)}: "
                f"the model has no such layer; it has {listing(layers, 'and')}. Name one of them, or remove {regularizer.name}."
            )
    for k, (encoder, decoder) in enumerate(zip(model.encoder.slices(), reversed(model.decoder.slices()), strict=False)):
        if encoder.shapes.x != decoder.shapes.x or encoder.shapes.latent != decoder.shapes.latent:
            raise RecipeError(
                f"slice {k + 1} of the encoder goes from {encoder.shapes.x} to {encoder.shapes.latent} numbers, the decoder's "
                f"from {decoder.shapes.latent} to {decoder.shapes.x}. Leave the decoder's sizes out: they mirror the encoder's."
            )


def on_codes(head: Head, shapes: Shapes) -> Model:
    """The model that trains a head on stored latents (N, K): no encoder to run, nothing to reconstruct."""
    return Model(Stored(Stored.Config(), replace(shapes, x=(shapes.latent,))), head=head)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, and each module's own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
