"""Run a workload, reduce activations to statistics, score and rank modules."""
