"""The only place that imports ray: actors, ranking actor, evaluator pool, Tune sweep. Actors are thin: they own placement, retries
and streaming, never an algorithm."""
