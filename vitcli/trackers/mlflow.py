"""MLflow: the server of MLFLOW_TRACKING_URI, or mlflow.db beside the run folders, which `mlflow ui` opens."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = "mlflow"
EXPERIMENT, MARK = "vitcli", "vitcli.run"


class MLflow:
    """One run of MLflow for one run folder, however often it is resumed."""

    def __init__(self, run: Path, mark: str, step: int, recipe: Mapping[str, Any]):
        from mlflow import MlflowClient, entities  # pyright: ignore[reportAttributeAccessIssue]

        store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve().parent / 'mlflow.db'}"
        self._metric, self._client = entities.Metric, MlflowClient(tracking_uri=store, registry_uri=store)
        known = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known else self._client.create_experiment(EXPERIMENT)
        begun = self._client.search_runs([experiment], f"tags.`{MARK}` = '{mark}'")
        if begun:
            self._id = begun[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
            return
        self._id = self._client.create_run(experiment, tags={MARK: mark}, run_name=run.name).info.run_id
        for section, value in recipe.items():
            self._client.log_param(self._id, section, str(value)[:6000])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


begin = MLflow
