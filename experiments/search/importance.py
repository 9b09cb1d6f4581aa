"""How much each field of a search's space explains of the metric."""

from __future__ import annotations

import importlib.util
import math
import warnings

import optuna
from optuna.importance import BaseImportanceEvaluator, FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
from optuna.trial import TrialState, create_trial

from experiments.search.records import Table

FEWEST = 12  # finished trials below which no importance is stated
QUANTILE = 0.25  # of PED-ANOVA: the trials that count as good
FANOVA = "fANOVA (Hutter et al. 2014): the share of the variance that the field explains"
PED_ANOVA = (
    f"PED-ANOVA (Watanabe et al. 2023): how far the values of the best {100 * QUANTILE:g} % differ from those of all"
)


def importances(table: Table) -> tuple[dict[str, float], str]:
    """Return the importance of each field, which sum to 1, and the method. Empty with too few finished trials.

    fANOVA needs scikit-learn; without it, the method is PED-ANOVA.
    """
    finished = table.scored()
    if len(finished) < FEWEST or len(table.search.space) < 2 or len({r.value for r in finished}) < 2:
        return {}, ""
    evaluator: BaseImportanceEvaluator
    if importlib.util.find_spec("sklearn") is not None:
        evaluator, method = FanovaImportanceEvaluator(seed=0), FANOVA
    else:
        evaluator, method = PedAnovaImportanceEvaluator(target_quantile=QUANTILE), PED_ANOVA
    distributions = {d.field: d.distribution() for d in table.search.space}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(direction="minimize")
        for r in finished:
            study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE, value=r.value, params=dict(r.values), distributions=distributions
                )
            )
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=True)
    if not all(math.isfinite(value) for value in found.values()):
        return {}, ""
    return {field: float(value) for field, value in found.items()}, method
