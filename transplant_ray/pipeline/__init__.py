"""The verbs, each in a file that reads from top to bottom: job (a recipe made concrete), planning, sweeping, exporting."""
