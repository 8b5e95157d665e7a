"""Fixtures that all tests share."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network; the hub tests start a server of their own
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread only waits, and badly on a busy machine


def pytest_collection_finish() -> None:
    """What was imported lives to the end, and need not be looked through again by each collection of garbage."""
    gc.collect()
    gc.freeze()
