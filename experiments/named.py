"""All named experiments, each as a function that returns it."""

from experiments.pods import PODS
from experiments.quickstart import EXPERIMENTS as QUICKSTART

EXPERIMENTS = {**QUICKSTART, **PODS}
