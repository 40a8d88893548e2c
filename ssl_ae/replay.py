"""A step recorded as a CUDA graph and replayed: launching the kernels of a small model takes longer than computing them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ssl_ae.trace import Batch

LAUNCHED = 3  # steps made one launch at a time first: what is made lazily (optimizer state, library handles) is there then


class Refused(Exception):
    """The work did something that cannot be recorded, such as waiting for the device."""


class Replay:
    """`work(batch)` on a GPU: launched for the first batches, then recorded, from then on replayed in one launch.

    Every batch must have the shapes of the first. What `work` keeps from call to call must be written in place: a replay
    reads and writes the memory that it read and wrote when it was recorded. Generators are seeded by the caller before each
    call, so a replayed step draws what a launched one would.
    """

    def __init__(self, work: Callable[[Batch], None], *generators: torch.Generator) -> None:
        """`generators`: those that `work` draws from, beside the device's own."""
        self._work, self._generators = work, generators
        self._launched = 0
        self._stream: torch.cuda.Stream | None = None
        self._inputs: Batch | None = None  # the memory that the graph reads
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> None:
        """Raises Refused where recording fails: nothing has run then, and the caller launches the step itself."""
        if self._launched < LAUNCHED:
            self._launched += 1
            self._launch(batch)
            return
        if self._graph is None:
            self._record(batch)
        else:
            self._fill(batch)
        self._graph.replay()

    def _launch(self, batch: Batch) -> None:
        """On a stream of its own, as recording will be: what autograd ties to a stream is tied to that kind of stream."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._work(batch)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _fill(self, batch: Batch) -> None:
        # by identity: the target is x itself as long as nothing was done to the batch
        pairs = {id(there): (there, getattr(batch, name)) for name, there in vars(self._inputs).items() if there is not None}
        for there, given in pairs.values():
            there.copy_(given)

    def _record(self, batch: Batch) -> None:
        copies = {id(value): value.clone() for value in vars(batch).values() if value is not None}
        self._inputs = Batch(**{name: None if value is None else copies[id(value)] for name, value in vars(batch).items()})
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            # other threads (reading ahead, telling MLflow) may go on with the device meanwhile
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._work(self._inputs)
        except RuntimeError as error:
            raise Refused(str(error).partition("\n")[0]) from error
        self._graph = graph
