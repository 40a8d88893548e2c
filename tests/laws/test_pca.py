"""The linear autoencoder is PCA (Baldi & Hornik 1989): same error, same subspace, on scikit-learn's digits."""

import numpy as np
import torch
from engine_kit import CPU, feed_of, fresh, resolved, trainer_of
from scipy.linalg import subspace_angles
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from ssl_ae.validation import validate

K = 7


def test_the_linear_autoencoder_is_pca():
    x = load_digits().data / 16
    found = resolved(
        shape=(64,),
        model={"latent_dim": K, "encoder": {"name": "linear"}, "decoder": {"name": "linear"}},
        pretrain={
            "epochs": 1500,
            "batch_size": len(x),
            "optimizer": {"name": "adam", "lr": 0.02},
            "schedule": {"name": "cosine"},
            "log_every": 10_000,
        },
    )
    feed = feed_of(x.astype(np.float32), dtype=torch.float32)
    trainer = trainer_of(found, "pretrain", feed, fresh(found, dtype=torch.float32))
    trainer.run()
    pca = PCA(K).fit(x)
    best = ((x - pca.inverse_transform(pca.transform(x))) ** 2).mean()
    ours = validate(trainer.model, trainer.runs[0].phase.objective, feed)["mse"]
    assert best * (1 - 1e-5) <= ours <= best * 1.001  # nothing linear beats PCA
    angles = subspace_angles(trainer.model.decoder.linear.weight.detach().numpy(), pca.components_.T)
    assert angles.max() < 0.02
    with torch.no_grad():
        rebuilt = trainer.model.decode(trainer.model.features(torch.tensor(x, dtype=torch.float32, device=CPU))).mean.numpy()
    np.testing.assert_allclose(rebuilt.mean(0), x.mean(0), atol=2e-3)  # the biases learn the mean
