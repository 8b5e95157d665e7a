"""The only place that imports mlflow: runs, metrics, figures and the winner's checkpoint."""
