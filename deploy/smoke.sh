#!/usr/bin/env bash
# The whole way on one machine: a Ray head with a dashboard and a token, an MLflow server, the demo's recipe as a submitted job, and a look
# into MLflow through its API: is the run there, and its winner?
#
# usage: deploy/smoke.sh [KEY=VALUE ...]        changes to the recipe, e.g. sweep.k=[4]
#        PYTHON=.venv/bin/python deploy/smoke.sh; MLFLOW_TRACKING_URI=http://… deploy/smoke.sh for a server that runs already
#
# All that it starts listens on loopback, on free ports, and is ended with it; all that it writes is in a folder under /tmp.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
bin=$(dirname "$python")
folder=$(mktemp -d /tmp/smoke-XXXXXX) # short: Ray's sockets are in it
started=()
job=

finish() {
    code=$?
    trap - EXIT INT TERM
    if [ -n "$job" ]; then # it would outlive the head
        timeout 60 "$bin/ray" job stop --address "http://127.0.0.1:$dashboard" "$job" > /dev/null 2>&1 || true
    fi
    for ((i = ${#started[@]} - 1; i >= 0; i--)); do
        kill -TERM "${started[i]}" 2> /dev/null || true # one that has ended already
        wait "${started[i]}" 2> /dev/null || true
    done
    if [ "$code" = 0 ]; then
        rm -rf "$folder"
    else
        echo "smoke: failed; what was said and written is in $folder" >&2
    fi
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

wait_for() { # URL PID NAME
    for _ in $(seq 120); do
        kill -0 "$2" 2> /dev/null || { echo "smoke: $3 has ended; see $folder" >&2; return 1; }
        "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1" 2> /dev/null && return
        sleep 1
    done
    echo "smoke: $3 is not up after two minutes; see $folder" >&2
    return 1
}

uri=${MLFLOW_TRACKING_URI:-}
if [ -z "$uri" ]; then
    port=$(free_port)
    PATH="$bin:$PATH" deploy/mlflow-server.sh "$folder/mlflow" "$port" > "$folder/mlflow.log" 2>&1 &
    started+=($!)
    uri=http://127.0.0.1:$port
    wait_for "$uri/health" $! "the MLflow server"
fi

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token RAY_USAGE_STATS_ENABLED=0
# Ray makes an address that other machines reach of 127.0.0.1, and listens on all, unless it takes this for a machine without clusters.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
(umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH")
start_head() { # ATTEMPT
    dashboard=$(free_port)
    "$bin/ray" start --head --block --temp-dir="$folder/ray-$1" --num-cpus=4 --node-ip-address=127.0.0.1 --port="$(free_port)" \
        --ray-client-server-port="$(free_port)" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
        --dashboard-agent-listen-port="$(free_port)" > "$folder/head-$1.log" 2>&1 &
    head=$!
    started+=("$head")
    wait_for "http://127.0.0.1:$dashboard/api/gcs_healthz" "$head" "the Ray head" || return 1
    until grep -q "will now block" "$folder/head-$1.log"; do kill -0 "$head" 2> /dev/null || return 1; sleep 1; done
    sleep 3 # then it looks once whether all its parts have come up
    kill -0 "$head" 2> /dev/null
}

# Ray gives its parts 30 seconds to find each other, which a busy machine can miss.
start_head 1 || start_head 2 || start_head 3

job=smoke
PYTHONPATH=$PWD "$bin/ray" job submit --address "http://127.0.0.1:$dashboard" --submission-id "$job" --working-dir . \
    --runtime-env cluster/runtime-env.yaml -- \
    "$python" jobs/sweep.py jobs/recipes/cross-generation.yaml name=smoke "storage=$folder/runs" "tracking.uri=$uri" "$@"
job=

"$python" - "$uri" "$folder/runs/smoke/summary.json" << 'END'
import json
import sys

from mlflow import MlflowClient

uri, path = sys.argv[1:]
with open(path) as file:
    summary = json.load(file)
client = MlflowClient(uri, uri)
parent = client.get_run(summary["mlflow_run"])
assert parent.info.status == "FINISHED", parent.info.status
children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
winners = [run for run in children if run.data.tags.get("winner") == "true"]
assert [run.info.run_name for run in winners] == [summary["winner"]["label"]], winners
version = client.get_model_version_by_alias("smoke", "winner")
assert version.run_id == winners[0].info.run_id
print(f"smoke: run {parent.info.run_id} has {len(children)} trials; {winners[0].info.run_name} won and is model smoke/{version.version}")
END
