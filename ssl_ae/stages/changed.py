"""What `--force` carries: changes that leave every weight what it would have been, so that no result is a mixture of two recipes.

- software: another release of ssl-ae, of a plugin or of torch under an unfinished stage. The components still have their
  versions, by which their authors say that they compute the same; the last bits may differ.
- log_every, max_nonfinite_steps, baselines: what is read, when training gives up, what is fitted beside the model.
- more epochs for an unfinished stage of a constant schedule: its steps so far are the first of a run that takes as long.

Everything else is refused with the diff: seed, data, labels, model, optimizer, precision, and versions of components.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

from ssl_ae.recipe import Pretrain, Training
from ssl_ae.resolve import Resolved
from ssl_ae.runs import Allow

OF_ANY_LENGTH = ("constant",)  # schedules whose steps do not know how many are to come
BESIDE_THE_WEIGHTS = ("log_every", "max_nonfinite_steps", "baselines")


def software(resolved: Resolved, head: bool) -> dict[str, str]:
    """{distribution: version} of what computes; of torch without the part that tells its builds apart."""
    parts = [part for part in resolved.parts if head or part is not resolved.head]
    plugins = {part.entry.plugin.distribution: part.entry.plugin.version for part in parts}
    return {**dict(sorted(plugins.items())), "torch": importlib.metadata.version("torch").partition("+")[0]}


def allowed(section: str, training: Training, has_slices: Callable[[], bool] = lambda: False) -> Allow:
    """Whether `--force` carries a change to a stage whose training is in this section of the recipe.

    `has_slices`: whether slices of the model train before the whole, by default for as many epochs.
    """
    beside = {f"{section}.{name}" for name in BESIDE_THE_WEIGHTS}

    def longer(before: Any, after: Any) -> bool:
        alike = training.schedule.name in OF_ANY_LENGTH
        if isinstance(training, Pretrain) and training.slice_epochs is None:
            alike = alike and not has_slices()
        return alike and after > before

    def allow(name: str, before: Any, after: Any, done: bool) -> bool:
        if name == f"{section}.epochs":
            return not done and longer(before, after)
        return name in beside or name.startswith("software.")

    return allow
