"""Hyperparameter searches over one named experiment: space, sampler, pruner, workers, report."""
