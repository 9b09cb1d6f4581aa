"""Studies: one file each, with a `STUDY`. `python -m experiments study NAME` runs one (docs/experiments.md)."""
