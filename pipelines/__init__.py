"""One public function a flow; the only place that knows Ray and MLflow."""

import os

# MLflow reads these when it is imported, by whichever module comes first.
for variable, value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # 7, over minutes: pipelines.tracking.retry tries again
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # 120 s
}.items():
    os.environ.setdefault(variable, value)
