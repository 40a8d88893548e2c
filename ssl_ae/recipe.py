"""A recipe: everything a run depends on, in YAML. This room knows its grammar; `resolve` knows the components."""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from ssl_ae.errors import RecipeError, did_you_mean, listing

Positive = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Mode = Literal["sequential", "joint", "alternate", "end-to-end"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def either(text: Any, section: type[Section], expected: str) -> Any:
    """A field that is a text of some type or a section: by what is given, so that only one of them complains."""

    def kind(given: Any) -> str | None:
        return "<text>" if isinstance(given, str) else "<section>" if isinstance(given, (dict, section)) else None

    members = Annotated[text, Tag("<text>")] | Annotated[section, Tag("<section>")]
    return Annotated[members, Discriminator(kind, "either", f"expected {expected}")]


class ComponentEntry(BaseModel):
    """A component by name; every other key is an option of the component's own."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = Field(min_length=1, description="short name, or plugin/component")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class RegularizerEntry(ComponentEntry):
    weight: float = Field(1.0, ge=0, description="factor of the penalty")
    warmup_steps: int = Field(0, ge=0, description="steps over which the weight grows linearly from 0")
    layers: tuple[str, ...] | None = Field(None, description="names of layers it acts on, `h*` for all hidden ones")


DEEPEST, LARGEST = 30, 100_000  # levels and values of a recipe's tree

LABELS = "{per_class: N} or {total: N}, all, or a CSV or Parquet file of key,label"


class LabelBudget(Section):
    """So many labels, drawn class-balanced; draws of one seed are nested: 100 labels contain the 10."""

    per_class: Positive | None = Field(None, description="labels of each class")
    total: Positive | None = Field(None, description="labels in all")
    seed: int = Field(0, ge=0, description="which draw")

    @model_validator(mode="after")
    def _one_of_two(self) -> LabelBudget:
        if (self.per_class is None) == (self.total is None):
            raise ValueError("give either per_class or total")
        return self


class Data(Section):
    path: str = Field(description="folder made by `ssl-ae data pack`, or of WebDataset shards")
    source: str | None = Field(
        None, description="packed into `path` on first use: a path, or the name of a data set such as digits"
    )
    labels: either(str, LabelBudget, LABELS) = Field("all", description=LABELS)
    guesses: str | None = Field(
        None,
        description="Parquet file of `ssl-ae predict`: class probabilities of train rows, which some regularizers learn from",
    )
    residency: Literal["auto", "resident", "stream"] = Field(
        "auto", description="resident: decoded in memory; stream: read as needed"
    )
    damaged: Literal["fail", "skip"] = Field(
        "fail", description="skip: samples and shards that cannot be read are left out, counted and told"
    )
    damaged_limit: float = Field(0.01, ge=0, le=1, description="of skip: share of a split's samples above which it fails")
    card_sha256: str | None = Field(None, description="written by ssl-ae: fingerprint of the data that a run was made with")
    scale: Literal["auto", "range", "standard", "none"] = Field(
        "auto", description="range: the card's range to [0, 1]; standard: zero mean, unit variance; auto: by kind of data"
    )


class ModelSection(Section):
    latent_dim: Positive = Field(32, description="K, the size of the code")
    samples: Positive = Field(1, description="S, draws of z a row over which l_X is averaged")
    encoder: ComponentEntry = ComponentEntry(name="mlp")
    decoder: ComponentEntry = ComponentEntry(name="mlp")
    regularizers: tuple[RegularizerEntry, ...] = ()
    head: ComponentEntry = ComponentEntry(name="softmax")


class Optimizer(Section):
    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0, description="learning rate at its highest")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, L2 in the gradient for adam and sgd")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="of adam and adamw")


class Schedule(Section):
    name: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate grows linearly from 0")
    hold: float = Field(0.0, ge=0, lt=1, description="part of the steps, warm-up included, before the rate starts to fall")
    final: float = Field(0.0, ge=0, le=1, description="last learning rate as a fraction of the highest")


class EarlyStopping(Section):
    metric: str = Field("val/loss", description="lower is better, except accuracy")
    patience: Positive = Field(5, description="epochs without improvement")


class Training(Section):
    epochs: Positive = Field(20, description="passes over the train split")
    min_steps: int = Field(0, ge=0, description="small data are passed over more often than `epochs`, for so many steps at least")
    batch_size: Positive = Field(256, description="rows of a step, over all ranks")
    micro_batches: Positive = Field(1, description="parts of a rank's rows that go through the model one after another")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the whole gradient")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of an exponential moving average of the weights")
    early_stopping: EarlyStopping | None = None
    log_every: Positive = Field(50, description="steps between two readings of the metrics")
    max_nonfinite_steps: Positive = Field(
        10, description="steps in a row with a gradient that is not finite before training stops"
    )


class Pretrain(Training):
    epochs: Positive = Field(30, description="passes over the train split")
    slice_epochs: int | None = Field(
        None,
        ge=0,
        description="passes of each slice of the encoder before the whole trains; default: as `epochs`, where it has any",
    )


class Solver(Section):
    """How sequential mode trains its head."""

    name: Literal["steps", "lbfgs"] = Field(
        "steps",
        description="steps: by `optimizer`, for `epochs`; lbfgs: to the minimum of mean l_Y + optimizer.weight_decay/2 |W|^2 "
        "over all labels at once, for a head that is linear in the code; only the labels-only baseline is then trained by steps",
    )
    tolerance: float = Field(
        1e-4, ge=1e-8, description="of lbfgs: largest entry of the gradient, in nats a row of whitened latents, at which it stops"
    )
    max_passes: Positive = Field(1000, description="of lbfgs: passes over the labels at most")


class Finetune(Training):
    mode: Mode = "sequential"
    solver: Solver = Solver()
    alpha: float = Field(0.01, ge=0, description="weight of l_X beside l_Y in joint mode")
    labeled_fraction: float = Field(0.25, ge=0, lt=1, description="part of a joint batch that is extra labelled rows")
    init: Literal["pretrained", "scratch"] = Field("pretrained", description="weights that encoder and decoder start from")
    baselines: bool = Field(
        True,
        description="also train on the same labels: the labels-only network, without and with the recipe's perturbations, and "
        "PCA + logistic regression",
    )


StageName = Literal["pretrain", "extract", "finetune", "predict", "evaluate"]


class Stage(Section):
    stage: StageName
    set: dict[str, Any] = Field({}, description="fields as --set writes them, for this stage alone")


OneStage = either(StageName, Stage, "the name of a stage, or {stage: NAME, set: {KEY: VALUE}}")


class Rounds(Section):
    """Stages that are repeated, each time from what the last time left."""

    repeat: Positive = Field(description="how often")
    stages: tuple[OneStage, ...] = Field(min_length=1)


def _kind_of_stage(given: Any) -> str:
    rounds = "repeat" in given if isinstance(given, dict) else isinstance(given, Rounds)
    return "<rounds>" if rounds else "<stage>"


STAGE_OR_ROUNDS = Annotated[
    Annotated[OneStage, Tag("<stage>")] | Annotated[Rounds, Tag("<rounds>")], Discriminator(_kind_of_stage)
]


class Recipe(Section):
    """What `ssl-ae recipe show` prints and a run folder keeps."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="of the run folder and the MLflow experiment"
    )
    seed: int = Field(0, ge=0)
    data: Data
    model: ModelSection = ModelSection()
    pretrain: Pretrain = Pretrain()
    finetune: Finetune = Finetune()
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32", description="of the products while training; auto: bf16 where the device computes in it itself, else fp32"
    )
    compile: Literal["auto", True, False] = Field(
        "auto",
        description="true: torch.compile; auto: on a GPU a step's launches are recorded once and replayed, on a CPU nothing",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="over ranks. ddp: each has the whole model; fsdp: each stores a share of weights, gradients and optimizer",
    )
    stages: tuple[STAGE_OR_ROUNDS, ...] = Field(
        ("pretrain", "extract", "finetune", "evaluate"),
        description="what `ssl-ae run` does; {stage: finetune, set: {finetune.mode: joint}} changes fields for one stage; "
        "{repeat: 2, stages: [...]} does some stages twice",
    )
    components: dict[str, dict[str, Any]] | None = Field(
        None, description="written by ssl-ae: versions of what the run was made with"
    )


def load(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `--set` overrides. Raises RecipeError: place, value, what is allowed, nearest match."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = did_you_mean(str(path), map(str, near))
        raise RecipeError(f"there is no recipe {path}.{hint}") from error
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no name that a file can have
        raise RecipeError(f"{path} cannot be read: {error}.") from error
    tree = _read_yaml(text, f"{path} is no YAML")
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with at least `name` and `data`; this is {type(tree).__name__}.")
    for override in overrides:
        _override(tree, override)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], source: str = "recipe") -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, Recipe, source))) from error


def explain(error: ValidationError, model: type[BaseModel], source: str, place: str = "") -> list[str]:
    """One line for each thing wrong: `source: place = value: expected ...`."""
    lines = []
    for item in error.errors():
        location = [part for part in item["loc"] if part not in ("<text>", "<section>", "<stage>", "<rounds>")]
        name = ".".join([place, *map(str, location)] if place else [str(part) for part in location])
        given = "" if item["type"] == "missing" else f" = {_shown(item['input'])}"
        if item["type"] == "extra_forbidden":
            fields = _fields_at(model, location[:-1])
            line = f"unknown key; allowed: {listing(fields, 'and')}.{did_you_mean(str(location[-1]), fields)}"
            given = ""
        elif item["type"] == "literal_error":
            allowed = _literals(item)
            line = f"expected {item['ctx']['expected']}.{did_you_mean(str(item['input']), allowed)}".replace("'", "")
        elif item["type"] == "missing":
            line = "is missing."
        else:
            line = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            line = f"expected {line}." if item["msg"].startswith("Input should be ") else f"{line}."
        lines.append(f"{source}: {name}{given}: {line}")
    return list(dict.fromkeys(lines))


def with_fields(recipe: Recipe, fields: dict[str, Any], source: str = "recipe") -> Recipe:
    """The same recipe with fields, named as `--set` names them, replaced."""
    tree = recipe.model_dump(mode="json", exclude={"components"})
    for key, value in fields.items():
        _assign(tree, key, value, f"{source}: {key}")
    return parse(tree, source)


def in_every_stage(recipe: Recipe, fields: dict[str, Any], dropped: Iterable[str] = ()) -> Recipe:
    """The recipe whose stages set these fields too, and none of `dropped` nor parts of them, whatever else they set."""

    def setting(entry: str | Stage | Rounds) -> Stage | Rounds:
        if isinstance(entry, Rounds):
            return entry.model_copy(update={"stages": tuple(map(setting, entry.stages))})
        stage = entry if isinstance(entry, Stage) else Stage(stage=entry)
        own = {name: value for name, value in stage.set.items() if not any(meet(name, key) for key in dropped)}
        return stage.model_copy(update={"set": {**own, **fields}})

    return recipe.model_copy(update={"stages": tuple(map(setting, recipe.stages))}) if fields or dropped else recipe


def meet(one: str, other: str) -> bool:
    """Whether one field is the other, or a part of it."""
    shorter, longer = sorted((f"{one}.", f"{other}."), key=len)
    return longer.startswith(shorter)


def to_yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def _override(tree: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set {text}: expected KEY=VALUE, as in --set model.latent_dim=16.")
    _assign(tree, key.strip(), _read_yaml(value, f"--set {text}: the value is no YAML"), f"--set {text}")


def _read_yaml(text: str, complaint: str) -> Any:
    """Plain values, lists and mappings. Raises RecipeError for anything else, and for more than any recipe needs."""
    try:
        tree = yaml.safe_load(text)
        count = _count(tree, {}, 0)
    except RecursionError as error:
        raise RecipeError(f"{complaint} of ours: it is nested more than {DEEPEST} deep, or in itself.") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError) as error:  # the last four of bad scalars
        raise RecipeError(f"{complaint}: {' '.join(str(error).split())}.") from error
    if count > LARGEST:
        raise RecipeError(f"{complaint} of ours: it stands for {count:,} values, and a recipe has {LARGEST:,} at most.")
    return tree


def _count(node: Any, known: dict[int, int], depth: int) -> int:
    """Values in a tree, those that an alias repeats counted each time: nine lines of aliases are a billion values."""
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(node, int) and node.bit_length() > 64:
        raise ValueError("a whole number takes at most 64 bits")
    if not isinstance(node, (dict, list, set, tuple)):
        return 1
    if id(node) not in known:
        parts = [*node, *node.values()] if isinstance(node, dict) else node
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in parts)
    return known[id(node)]


def _assign(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    *parents, last = key.split(".")
    node: Any = tree
    for i, part in enumerate(parents):
        where = ".".join(parents[: i + 1])
        place = _index(node, part, source) if isinstance(node, list) else part
        child = node[place] if isinstance(node, list) else node.get(place, {})
        if not isinstance(child, (dict, list)):
            raise RecipeError(f"{source}: {where} is {_shown(child)}, which has no fields. Set {where} itself.")
        node[place] = copy.copy(child)  # an anchor of YAML puts one object at several places
        node = node[place]
    if isinstance(node, list):
        node[_index(node, last, source)] = value
    else:
        node[last] = value


def _index(node: list, part: str, source: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(f"{source}: {part!r} is no position in a list of {len(node)}; positions start at 0.")
    return int(part)


def _fields_at(model: type[BaseModel], location: list[str | int]) -> list[str]:
    """The fields allowed at a place of the tree."""
    current: Any = model
    for part in location:
        if isinstance(part, str) and isinstance(current, type) and issubclass(current, BaseModel):
            current = _model_in(current.model_fields[part].annotation)
    return [name for name in current.model_fields if name != "components"] if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, Annotated):
        return next(filter(None, map(_model_in, typing.get_args(annotation))), None)
    return None


def _literals(item: Any) -> list[str]:
    return [part.strip(" '") for part in item["ctx"]["expected"].replace(" or ", ",").split(",")]


def _shown(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
