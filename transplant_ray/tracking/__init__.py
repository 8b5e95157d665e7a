"""The only place that imports mlflow: runs, metrics, figures and the winner's checkpoint."""

import os

# Here, before any module below imports mlflow: that is when the first of them is read.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a line for every trial, passwords in addresses included
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the outbox tries again, and knows what may have arrived
