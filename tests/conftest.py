"""Fixtures that all tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network; the hub tests start a server of their own
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread only waits, and badly on a busy machine
