"""Reports to MLflow, which also reads MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

import json
import os
from collections.abc import Mapping, Sequence

from train.reporters.contract import PROJECT, Ending, Sample, Start, Tracker

_PARAMS_PER_CALL = 100  # parameters that one call takes
_MAX_PARAM_CHARS = 6000  # characters of one
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow:
    """Logs to one run of MLflow through a client, without changing the process's active run."""

    def __init__(self, start: Start) -> None:
        """Creates a run with the options as parameters, or continues an earlier run."""
        import mlflow

        self._client = mlflow.MlflowClient()
        self._metric = mlflow.entities.Metric
        if start.run_id is not None:
            self._id = start.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            experiment_id = self._experiment_id(start.project)
            self._id = self._client.create_run(experiment_id, run_name=start.name).info.run_id
            params = []
            for key, value in start.config.items():
                params.append(mlflow.entities.Param(key, str(value)[:_MAX_PARAM_CHARS]))
            for index in range(0, len(params), _PARAMS_PER_CALL):
                self._client.log_batch(self._id, params=params[index : index + _PARAMS_PER_CALL])
        self.run_id: str | None = self._id

    def _experiment_id(self, project: str | None) -> str:
        """Returns the id of a project's experiment, which is created if it does not exist."""
        name = project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)

    def report(self, step: int, values: Mapping[str, float], at: float) -> None:
        """Logs the values."""
        at_ms = round(1000 * at)
        metrics = [self._metric(name, value, at_ms, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def show(self, step: int, samples: Sequence[Sample], at: float) -> None:
        """Logs the samples as a file of JSON lines."""
        lines = [json.dumps(sample._asdict(), ensure_ascii=False) for sample in samples]
        text = "".join(f"{line}\n" for line in lines)
        self._client.log_text(self._id, text, f"samples/step_{step:07}.jsonl")

    def close(self, how: Ending) -> None:
        """Marks the MLflow run as ended. A resumed run marks it as running again."""
        self._client.set_terminated(self._id, _STATUS[how])


TRACKER = Tracker(reporter=MLflow, package="mlflow", extra="mlflow")
