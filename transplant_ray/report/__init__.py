"""The report of a sweep: one HTML file, a table as CSV and as LaTeX, all from the run folder alone."""
