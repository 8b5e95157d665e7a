"""Tasks, generation, answer scoring, metrics, results and the winner."""
