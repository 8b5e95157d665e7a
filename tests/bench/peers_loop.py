"""Runs in the peers' virtual environment: merge and evaluate several times in one process, so that start-up is left out.

peers_loop.py TASK MODEL_ARGS ROUNDS    in a folder as `peers.py` prepares it; prints a JSON list of [merge, evaluate] seconds
"""

import json
import sys
import time
from pathlib import Path

import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

task, model_args, rounds = sys.argv[1:]
merge = MergeConfiguration.model_validate(yaml.safe_load(Path("merge.yml").read_text()))
manager = TaskManager(include_path="tasks", include_defaults=False)
seconds = []
for _ in range(int(rounds)):
    start = time.perf_counter()
    run_merge(merge, "merged", MergeOptions(quiet=True))
    merged = time.perf_counter()
    simple_evaluate("hf", model_args, [task], task_manager=manager, batch_size=64, device="cpu", log_samples=False)
    seconds.append([merged - start, time.perf_counter() - merged])
print(json.dumps(seconds))
