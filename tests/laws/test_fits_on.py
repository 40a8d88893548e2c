"""Table heads that say they are fitted on an accelerator are: nothing is left on the host, and they learn the same."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from device_kit import HOST, THERE, Accelerator
from ssl_ae_builtins.auto import Auto
from ssl_ae_builtins.image_spreading import ImageLabelSpreading
from ssl_ae_builtins.label_spreading import LabelSpreading
from ssl_ae_builtins.table_heads import Logistic

from ssl_ae.components import TableHead
from ssl_ae.stages import fitted_head
from ssl_ae.trace import Shapes

N, K, C, SHAPE = 211, 7, 3, (2, 5, 11)

HEADS = {
    "label_spreading": (LabelSpreading, {}),
    "chosen": (LabelSpreading, {"k": "auto", "metric": "auto", "sharpen": 2, "prior": "uniform"}),
    "given prior": (LabelSpreading, {"metric": "euclidean", "prior": (0.5, 0.3, 0.2)}),
    "images": (ImageLabelSpreading, {"beside": "samples"}),
    "images beside latents": (ImageLabelSpreading, {"sharpen": 2, "prior": "labels"}),
    "auto": (Auto, {"trees": 5}),
}


def rows():
    """Codes in clusters, every third one's label, and images of which a head takes what it reads."""
    random = np.random.default_rng(0)
    truth = random.integers(C, size=N)
    z = torch.from_numpy(random.normal(size=(N, K)) + 2.0 * np.eye(K)[truth]).float()
    y = torch.from_numpy(np.where(np.arange(N) % 3, -1, truth))
    return z, y, torch.from_numpy(random.random((N, 110))).float()


def build(cls, options):
    return cls(cls.Config(**options), Shapes(x=SHAPE, latent=K, classes=C, targets=None))


def samples_of(head, x, y):
    if head.reads_all_samples(head.config):
        return [x]
    return [x[y >= 0]] if head.reads_samples else []


@pytest.mark.parametrize("name", HEADS)
def test_a_head_learns_there_what_it_learns_here(name):
    z, y, x = rows()
    here, there = build(*HEADS[name]), build(*HEADS[name])
    here.fit(z, y, *samples_of(here, x, y))
    seen = [z, x] if here.reads_samples else [z]
    with Accelerator() as accelerator:
        there.fit(*map(accelerator.send, (z, y, *samples_of(there, x, y))))
        there.to(THERE)
        found = there.predict(*map(accelerator.send, seen)).probs
        assert accelerator.holds(found)
        found = found.cpu()
    assert torch.equal(found, here.predict(*seen).probs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", HEADS)
def test_a_gpu_finds_what_the_host_finds(name):
    z, y, x = rows()
    here, there = build(*HEADS[name]), build(*HEADS[name])
    here.fit(z, y, *samples_of(here, x, y))
    there.fit(*(each.cuda() for each in (z, y, *samples_of(there, x, y))))
    seen = [z, x] if here.reads_samples else [z]
    found = there.cuda().predict(*(each.cuda() for each in seen)).probs.cpu()
    assert torch.allclose(found, here.predict(*seen).probs, atol=1e-4)


def test_the_graph_is_made_there():
    z, y, _ = rows()
    head = build(LabelSpreading, {})
    with Accelerator() as accelerator:
        head.fit(*map(accelerator.send, (z, y)))
        assert all(map(accelerator.holds, (head.codes, head.p, head.center)))


class Forgetful(TableHead):
    """Says that it is fitted on CUDA, but makes what it adds up on the host."""

    name = "forgetful"
    fits_on = frozenset({"cpu", "cuda"})

    def fit(self, z, y):
        self.keep("mean", torch.zeros(z.shape[1]) + z.mean(0))

    def predict(self, z):
        raise NotImplementedError


def test_the_kit_tells_a_head_that_mixes_places():
    z, y, _ = rows()
    head = build(Forgetful, {})
    head.fit(z, y)
    with Accelerator() as accelerator, pytest.raises(RuntimeError, match="add was given cuda:0 and cpu"):
        head.fit(*map(accelerator.send, (z, y)))


class Listening(Logistic):
    def fit(self, z, y):
        self.places = {z.device, y.device}
        super().fit(z, y)


class ListeningThere(LabelSpreading):
    def fit(self, z, y):
        self.places = {z.device, y.device}
        super().fit(z, y)


@pytest.mark.parametrize(("cls", "place"), [(Listening, HOST), (ListeningThere, THERE)])
def test_a_stage_fits_a_head_where_it_takes_its_tensors_and_leaves_it_on_the_device(cls, place):
    z, y, _ = rows()
    head, ws = build(cls, {}), SimpleNamespace(device=THERE)
    labels = SimpleNamespace(y=y.numpy(), known=y.numpy() >= 0)
    with Accelerator() as accelerator:
        fitted_head.fit(head, ws, z, labels)
        assert head.places == {place}
        assert all(map(accelerator.holds, head.buffers()))


def test_a_device_without_sparse_matrices_leaves_the_fit_to_the_host():
    assert build(LabelSpreading, {}).place(torch.device("mps")) == HOST
