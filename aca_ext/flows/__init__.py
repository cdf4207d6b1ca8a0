"""Continuous normalizing flows: densities carried along a vector field, and samples of them.

Sources: the change of log-density along a flow, Chen et al., Neural Ordinary Differential Equations, 2018; its estimate
by random vectors, Grathwohl et al., FFJORD, 2019 (Hutchinson's trace estimator, 1989); the two penalties, Finlay et
al., How to train your Neural ODE, 2020.
"""

from aca_ext.flows.divergence import DivergenceField, state_norm, with_divergence
from aca_ext.flows.likelihood import Likelihood, likelihood, log_prob, sample, sample_and_log_prob

__all__ = [
    "DivergenceField",
    "Likelihood",
    "likelihood",
    "log_prob",
    "sample",
    "sample_and_log_prob",
    "state_norm",
    "with_divergence",
]
