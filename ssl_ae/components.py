"""What a plugin writes: encoders, decoders, regularizers and heads, each with the options a recipe may give it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.distributions import Distribution

from ssl_ae.errors import PluginError
from ssl_ae.findings import Findings
from ssl_ae.latent import PosteriorKind
from ssl_ae.pictures import Picture
from ssl_ae.trace import Batch, Need, Over, Pass, Shapes, Trace

if TYPE_CHECKING:
    from ssl_ae.resolve import Resolved

ENGINE_OPTIONS = frozenset({"name"})  # keys of a component's entry that the engine reads itself


class Config(BaseModel):
    """The options of a component: frozen, unknown keys refused. Give each field a range and a description."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Component(nn.Module):
    """A part of a model that a recipe names. Subclasses set `name` and, where they have options, a nested `Config`."""

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raise it when stored weights or options change their meaning
    upgrades_from: ClassVar[frozenset[int]] = frozenset()  # older versions whose weights `upgrade` can rewrite
    kind: ClassVar[str]
    engine_options: ClassVar[frozenset[str]] = ENGINE_OPTIONS
    Config: ClassVar[type[Config]] = Config

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        options = cls.Config
        if not (isinstance(options, type) and issubclass(options, Config)):
            raise PluginError(f"{cls.__module__}.{cls.__qualname__}.Config must be a subclass of ssl_ae.Config.")
        taken = sorted(cls.engine_options & set(options.model_fields))
        if taken:
            raise PluginError(
                f"{cls.__qualname__}.Config declares {', '.join(taken)}, which the engine reads itself. Give it another name."
            )

    @classmethod
    def check(cls, config: Config, recipe: Resolved) -> Iterable[str]:
        """Complaints about options or about the other components, raised together before anything runs."""
        return ()

    @classmethod
    def upgrade(cls, version: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights stored by one of the versions `upgrades_from`, rewritten for this one; names are the component's own."""
        raise NotImplementedError(f"{cls.__qualname__} declares upgrades_from without an upgrade")

    def pictures(self, trace: Trace) -> Iterable[Picture]:
        """What this component would show of a trained model.

        `trace` is an undisturbed pass over up to 256 validation rows, with p_x and without gradients.
        """
        return ()


class Encoder(Component):
    """x -> q(z|x). Send layers through `run.tap(h, name)`, so that regularizers can reach them."""

    kind = "encoder"
    reads_decoder: ClassVar[bool] = False  # its parameters are the decoder's: what trains the one trains the other
    differentiable: ClassVar[bool] = True  # E[z|x] carries gradients to x and to the parameters
    noisy: ClassVar[bool] = False  # disturbs layers by itself while training (where run.step is given)
    conditional: ClassVar[bool] = False  # reads the label in run.condition: q(z|x, y)

    @abstractmethod
    def forward(self, x: Tensor, run: Pass) -> Distribution:
        """x (B, *shapes.x) -> q(z|x), batch shape (B,), event shape (shapes.latent,).

        Conditional: q(z|x, y) under run.condition (B, C); where that is None, the `Point` of features from which a head tells
        the label, q(y|x).
        """

    def slices(self) -> Sequence[Encoder]:
        """The encoder in parts, from x to the code, that are encoders themselves: part k reads what part k - 1 returns.

        Each is trained as an autoencoder on what the parts below it give, before the whole is. Empty for a single piece.
        """
        return ()

    def squared_jacobian(self, layers: Mapping[str, Tensor]) -> Tensor | None:
        """|dE[z|x]/dx|_F^2 per row, (B,), from the layers of an undisturbed pass, where there is a closed form."""
        return None

    @classmethod
    def posterior(cls, config: Config) -> PosteriorKind:
        """The kind of q(z|x) that these options give."""
        return "point"

    @classmethod
    def symbol(cls, config: Config) -> int | None:
        """Of a discrete code, how many numbers make one symbol; None for real codes. Discrete codes compare by Hamming distance.

        1: each number of E[z|x] is a bit, or the probability that it is 1. L: each L numbers are the probabilities of L values.
        """
        return None

    @classmethod
    def parts(cls, config: Config) -> int:
        """How many slices these options give; 1 for a single piece."""
        return 1

    @classmethod
    def unit_interval(cls, config: Config) -> tuple[str, ...]:
        """Names (patterns) of the layers whose values lie in [0, 1]: those that have a mean activity."""
        return ()


class Decoder(Component):
    """z -> p(x|z)."""

    kind = "decoder"
    reads_layers: ClassVar[bool] = False  # needs the encoder's layers in `run.taps`: it decodes no code without its sample
    conditional: ClassVar[bool] = False  # reads the label in run.condition: p(x|z, y)

    @abstractmethod
    def forward(self, z: Tensor, run: Pass) -> tuple[Distribution, dict[str, Tensor]]:
        """z (B, K) -> p(x|z), batch shape (B,), event shape shapes.x; and guesses of the encoder's layers by name, or {}.

        Conditional: p(x|z, y) under run.condition (B, C); where that is None, all labels are equally likely, 1 / C.
        """

    def slices(self) -> Sequence[Decoder]:
        """The decoder in parts, from the code to x, that are decoders themselves: the mirror of the encoder's."""
        return ()

    @classmethod
    def parts(cls, config: Config) -> int:
        """How many slices these options give; 1 for a single piece."""
        return 1

    @classmethod
    def likelihood(cls, config: Config) -> str:
        """The family of p(x|z) that these options give: gaussian, bernoulli, categorical."""
        return "gaussian"

    @classmethod
    def mirrored(cls, config: Config, encoder: Config) -> Config:
        """The options with whatever the recipe left open taken from the encoder's options."""
        return config


class Regularizer(Component):
    """Any of four verbs, in the order of a step; those a class does not define cost nothing.

    `over` says what `penalty` is averaged over, `needs` what it reads, `layers` where `perturb` acts unless the recipe says
    otherwise. `always = True` perturbs in evaluation and extraction too (a change of what the input is, not noise).
    `of_samples = True` perturbs x as the picture or signal it is, which no layer above is.
    """

    kind = "regularizer"
    engine_options = ENGINE_OPTIONS | {"weight", "warmup_steps", "layers"}
    over: ClassVar[Over] = Over.ROWS
    needs: ClassVar[frozenset[Need]] = frozenset()
    always: ClassVar[bool] = False
    of_samples: ClassVar[bool] = False
    layers: tuple[str, ...] = ("input",)
    verbs: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        names = ("transform", "perturb", "penalty", "project")
        cls.verbs = frozenset(verb for verb in names if getattr(cls, verb) is not getattr(Regularizer, verb))
        if Need.STEP_MEAN in cls.needs and cls.over is not Over.STEP:
            raise PluginError(
                f"{cls.__module__}.{cls.__qualname__}: needs = STEP_MEAN with over = {cls.over}: a mean over the step is exact "
                "in its gradient only for a penalty that is one value a step. Set over = Over.STEP."
            )
        if Need.LABEL_SUM in cls.needs and cls.over is not Over.ROWS:
            raise PluginError(
                f"{cls.__module__}.{cls.__qualname__}: needs = LABEL_SUM with over = {cls.over}: the mean over a row's labels is "
                "of a penalty that is one value a row. Set over = Over.ROWS."
            )

    def transform(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Change rows before the pass (flips, mixing). May replace x, target and soft."""
        return batch

    def perturb(self, h: Tensor, layer: str) -> Tensor:
        """Disturb a layer while training; the target of l_X stays clean."""
        return h

    def penalty(self, trace: Trace) -> Tensor | None:
        """Unweighted value in nats: (B,) for Over.ROWS and Over.LABELED, () for Over.STEP and Over.MODEL."""
        return None

    def project(self, model: nn.Module) -> None:
        """Bring parameters back to their constraint after a step. Called without gradients."""
        return


class Head(Component):
    """Features -> p(y|z), differentiable: works in every mode."""

    kind = "head"
    tasks: ClassVar[frozenset[str]] = frozenset({"classes"})  # of classes, regression, multilabel
    fitted_at_once: ClassVar[bool] = False
    reads_samples: ClassVar[bool] = False  # takes the samples beside their latents

    def prepare(self, y: Tensor) -> None:
        """Look at the labels to train on, y (N,) or (N, T), before the first step: to fix units, say."""
        return

    @abstractmethod
    def forward(self, features: Tensor) -> Distribution:
        """features (B, K) -> p(y|z): Categorical over classes, or Independent over targets with event shape (T,)."""

    @classmethod
    def convex(cls, config: Config) -> bool:
        """Whether these options give `output(W z + b)` with no parameters but W and b, and -log p(y|z) convex in them.

        Such a head can be brought to the minimum of l_Y at once (finetune.solver). It defines `affine`, `output` and `gradient`.
        """
        return False

    def affine(self) -> nn.Linear:
        """W (outputs, K) and b of a convex head."""
        raise NotImplementedError(f"{type(self).__qualname__} declares convex without affine")

    def output(self, raw: Tensor) -> Distribution:
        """raw (B, outputs), W z + b of a convex head -> p(y|z), each row by itself."""
        raise NotImplementedError(f"{type(self).__qualname__} declares convex without output")

    def gradient(self, p_y: Distribution, batch: Batch) -> Tensor:
        """d l_Y / d raw of each row at p_y = output(raw), (B, outputs): what autograd finds, in a third of its time.

        With `batch.weight_y`, 0 for unknown targets; `batch.soft` replaces y where given. All rows of the batch have labels.
        """
        raise NotImplementedError(f"{type(self).__qualname__} declares convex without gradient")


class Network(Protocol):
    """The pretrained encoder with a table head's rival on top, trained end to end on labels.

    Each time for so many steps, and until the labelled rows of its last pass have all been seen.
    """

    def held_out(self, y: Tensor, folds: Tensor, steps: int) -> Tensor:
        """y (N,), folds (R, L) of its labelled rows -> their probabilities, (R, L, C), by networks trained on the other folds."""

    def take(self, y: Tensor, steps: int) -> Head:
        """Train on the labels y (N,), make that network the model's own, and return the head on top of it."""


class TableHead(Component):
    """A model fitted at once on the table of stored latents: sequential mode only.

    What `fit` learns goes into buffers (`self.keep(name, tensor)`), which is all that is stored. With `reads_samples = True`
    both methods take the samples beside the latents, as a last argument: `fit(z, y, x)` those of the labelled rows alone,
    x (L, D), and `predict(z, x)` those of its own rows, x (B, D), scaled as the encoder sees them, D = prod(shapes.x).
    Where `reads_all_samples`, `fit` takes those of every row, x (N, D), and `predict` none.
    Where `rival` gives a head and labels can train the encoder, `fit` takes a `Network` behind them.
    """

    kind = "head"
    tasks: ClassVar[frozenset[str]] = frozenset({"classes"})
    fitted_at_once: ClassVar[bool] = True
    reads_unlabeled: ClassVar[bool] = False  # learns from where unlabelled rows lie, too
    reads_samples: ClassVar[bool] = False  # takes the samples beside their latents
    fits_on: ClassVar[frozenset[str]] = frozenset({"cpu"})  # types of device whose tensors `fit` takes
    found: Findings | None = None  # what the last `fit` found out that a user should be told, where it sets it

    @abstractmethod
    def fit(self, z: Tensor, y: Tensor, *more: Tensor | Network) -> None:
        """z (N, K) float32, y (N,) int64 with UNLABELED = -1, or (N, T) with NaN."""

    @abstractmethod
    def predict(self, z: Tensor, *x: Tensor) -> Distribution:
        """z (B, K) -> p(y|z), each row by itself."""

    @classmethod
    def reads_all_samples(cls, config: Config) -> bool:
        """Whether, with these options, `fit` takes the samples of all rows beside their latents: they are held in memory."""
        return False

    def place(self, device: torch.device) -> torch.device:
        """Where `fit` takes its tensors in a run on `device`: there, or on the host."""
        return device if device.type in self.fits_on else torch.device("cpu")

    def rival(self) -> Head | None:
        """A head to be trained end to end on top of the network, for `fit` to compare with; None where it does not."""
        return None

    def keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.detach().contiguous())

    def forward(self, features: Tensor, *x: Tensor) -> Distribution:
        return self.predict(features, *x)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # the sizes of what was learnt are known only from the stored tensors
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and "." not in name:
                self.keep(name, torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args)
