"""The linear autoencoder is PCA (Baldi & Hornik 1989): same error, same subspace, on scikit-learn's digits."""

import numpy as np
import pytest
import torch
from engine_kit import feed_of, fresh, resolved, trainer_of
from scipy.linalg import subspace_angles
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from ssl_ae.validation import validate


@pytest.mark.parametrize(("rows", "latent", "steps", "centred"), [(1797, 7, 700, True), (599, 4, 1500, False)])
def test_the_linear_autoencoder_is_pca(rows, latent, steps, centred):
    """Full-batch Adam with a cosine schedule. Where the data are not centred, the biases must learn their mean."""
    x = load_digits().data[:rows] / 16
    if centred:
        x = (x - x.mean(0)) / x.std()
    found = resolved(
        shape=(64,),
        model={"latent_dim": latent, "encoder": {"name": "linear"}, "decoder": {"name": "linear"}},
        pretrain={
            "epochs": steps,
            "batch_size": rows,
            "optimizer": {"name": "adam", "lr": 0.03},
            "schedule": {"name": "cosine"},
            "log_every": steps,
        },
    )
    feed = feed_of(x.astype(np.float32), dtype=torch.float32)
    trainer = trainer_of(found, "pretrain", feed, fresh(found, dtype=torch.float32))
    trainer.run()
    pca = PCA(latent).fit(x)
    best = ((x - pca.inverse_transform(pca.transform(x))) ** 2).mean()
    ours = validate(trainer.model, trainer.runs[0].phase.objective, feed)["mse"]
    assert best * (1 - 1e-6) <= ours <= best * 1.001  # nothing linear beats PCA
    weight = trainer.model.decoder.linear.weight.detach().numpy()
    assert subspace_angles(weight, pca.components_.T).max() < 0.01
    with torch.no_grad():
        rebuilt = trainer.model.decode(trainer.model.features(torch.tensor(x, dtype=torch.float32))).mean.numpy()
    np.testing.assert_allclose(rebuilt.mean(0), x.mean(0), atol=1e-3)
