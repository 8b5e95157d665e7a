#!/usr/bin/env bash
# An MLflow server for a lab: sqlite and a folder, reachable from this machine only.
# usage: deploy/mlflow-server.sh [FOLDER] [PORT]      then: tracking.uri=http://127.0.0.1:PORT
set -euo pipefail
folder=$(realpath -m "${1:-mlflow}")
port=${2:-5000}
mkdir -p "$folder/artifacts"
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
exec mlflow server --host 127.0.0.1 --port "$port" --workers 1 \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$folder/artifacts"
