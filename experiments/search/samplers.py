"""The samplers and pruners of Optuna that a search uses.

A sampler is made for each trial, with a seed from that of the search and the index of the trial. A proposal therefore
depends on the seed, the index and the finished trials alone: not on which worker asks, or how often it was restarted.
"""

from __future__ import annotations

import warnings

import numpy as np
import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler

from experiments.search.definition import Search

STARTUP_TRIALS = 10  # random ones before TPE models them
UNPRUNED_TRIALS = 5  # finished ones before the median prunes
UNPRUNED_PART = 4  # the median prunes after steps / 4: earlier curves say little, and favour short warmups
REDUCTION = 3  # of Hyperband: one trial in three passes a rung


def make_sampler(search: Search, index: int) -> BaseSampler:
    """Return the sampler of a trial."""
    seed = int(np.random.SeedSequence([search.seed, index]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "tpe":
            # multivariate: fields are modelled together; constant_liar: workers do not propose the same point.
            return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True)
        if search.sampler == "cmaes":
            return CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return RandomSampler(seed=seed)  # unused in a grid, whose values are fixed


def make_pruner(search: Search) -> BasePruner:
    """Return the pruner of a search."""
    train = search.base.train
    if search.pruner == "median":
        return MedianPruner(n_startup_trials=UNPRUNED_TRIALS, n_warmup_steps=train.steps // UNPRUNED_PART)
    if search.pruner == "hyperband":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return HyperbandPruner(min_resource=train.eval_every, max_resource=train.steps, reduction_factor=REDUCTION)
    return NopPruner()
