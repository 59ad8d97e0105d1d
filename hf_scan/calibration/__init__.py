# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Thresholds from cached scores."""

from .exit_table import ExitTable, collect_exit_logits
from .frontier import Frontier, exact_frontier
from .genetic import GeneticSearchResult, genetic_search
from .policy import answering_column, evaluate_policies
from .thresholds import calibrate


__all__ = [
    "ExitTable",
    "Frontier",
    "GeneticSearchResult",
    "answering_column",
    "calibrate",
    "collect_exit_logits",
    "evaluate_policies",
    "exact_frontier",
    "genetic_search",
]
