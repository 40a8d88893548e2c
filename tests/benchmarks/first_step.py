"""`ssl-ae` until its first optimizer step is done, and no further: the child that the row `start` times.

    python -m tests.benchmarks.first_step pretrain pipelines/digits_demo.yaml

It is the command itself; only when everything is imported is the listener replaced by one that ends the process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from ssl_ae.cli import main, stages

many_imports = stages.many_imports


@contextlib.contextmanager
def then_stop_at_the_first_step() -> Iterator[None]:
    with many_imports():
        yield
    from ssl_ae.stages.training_run import Teller  # which the command has imported by now

    Teller.stepped = lambda *_: os._exit(0)


if __name__ == "__main__":
    stages.many_imports = then_stop_at_the_first_step
    main()
    sys.exit("the command made no step")
