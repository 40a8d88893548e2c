"""The linear autoencoder without biases: PCA of centred data, the uncentred decomposition of others; and its picture."""

import numpy as np
import pytest
import torch
from engine_kit import feed_of, fresh, resolved, trainer_of
from scipy.linalg import subspace_angles
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from ssl_ae_builtins.linear import LinearDecoder

from ssl_ae import Shapes
from ssl_ae.trace import Pass
from ssl_ae.validation import validate

WITHOUT = {"name": "linear", "bias": False}
ROWS, LATENT, STEPS = 599, 4, 900


def trained(x, latent):
    """The model and its mse after full-batch Adam with a cosine schedule."""
    found = resolved(
        shape=(64,),
        model={"latent_dim": latent, "encoder": WITHOUT, "decoder": WITHOUT},
        pretrain={
            "epochs": STEPS,
            "batch_size": ROWS,
            "optimizer": {"name": "adam", "lr": 0.03},
            "schedule": {"name": "cosine"},
            "log_every": STEPS,
        },
    )
    feed = feed_of(x)
    trainer = trainer_of(found, "pretrain", feed, fresh(found, head=False))
    trainer.run()
    return trainer.model, validate(trainer.model, trainer.runs[0].phase.objective, feed)["mse"]


@pytest.mark.parametrize(("centred", "latent"), [(True, LATENT), (False, LATENT + 1)], ids=["centred", "uncentred"])
def test_without_biases_it_spans_the_leading_singular_vectors(centred, latent):
    """The best rank-K map of x is that on its leading right singular vectors (Eckart & Young 1936): PCA where x is centred.

    Where it is not, PCA, which takes the mean away first, leaves less: equality with PCA needs centring or biases.
    """
    x = load_digits().data[:ROWS] / 16
    x = x - x.mean(0) if centred else x
    model, mse = trained(x, latent)
    assert {name for name, _ in model.named_parameters()} == {"encoder.latent.linear.weight", "decoder.linear.weight"}
    _, sizes, vectors = np.linalg.svd(x, full_matrices=False)
    best = (sizes[latent:] ** 2).sum() / x.size
    assert best * (1 - 1e-9) <= mse <= best * 1.001
    assert subspace_angles(model.decoder.linear.weight.detach().numpy(), vectors[:latent].T).max() < 0.01
    pca = PCA(latent).fit(x)
    of_pca = ((x - pca.inverse_transform(pca.transform(x))) ** 2).mean()
    if centred:
        assert best == pytest.approx(of_pca, rel=1e-9)
    else:
        assert of_pca < 0.99 * best


@pytest.mark.parametrize("shape", [(3, 7, 5), (11,), (2, 13)])
@pytest.mark.parametrize("variance", ["unit", "decoder"])
def test_components_are_what_a_unit_of_the_code_adds(shape, variance):
    torch.manual_seed(0)
    decoder = LinearDecoder(LinearDecoder.Config(variance=variance), Shapes(shape, LATENT)).double()
    z = torch.randn(1, LATENT, dtype=torch.float64)
    added = decoder(z + torch.eye(LATENT, dtype=torch.float64), Pass())[0].mean - decoder(z, Pass())[0].mean
    (picture,) = decoder.pictures(None)
    assert picture.signed
    torch.testing.assert_close(picture.tiles, added, rtol=0, atol=1e-12)


def test_many_logits_for_each_number_are_no_picture():
    decoder = LinearDecoder(LinearDecoder.Config(likelihood="categorical", levels=3), Shapes((1, 5, 7), LATENT))
    assert list(decoder.pictures(None)) == []
