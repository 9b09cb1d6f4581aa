"""Studies: statistics, fits and verdicts for claims about several runs."""
