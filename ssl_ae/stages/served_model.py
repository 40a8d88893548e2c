"""The model script that MLflow stores and runs: our safetensors behind `mlflow models predict` and `serve`, without pickle."""

from __future__ import annotations

from ssl_ae.stages.predict import Predictor
from ssl_ae.tracking.serving import serve

if (
    __name__ != "ssl_ae.stages.served_model"
):  # MLflow runs this file as a script of its own; importing it must not register a model
    serve(Predictor.load)
