# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Find thresholds from cached scores, certify them, and watch for drift."""

from ..extras import require_extra
from ..model.exit_rule import answering_column


try:
    from .calibrate import calibrate, certify_thresholds
    from .certify import CannotCertifyError, Certificate, RiskBound, certify
    from .cross_fitting import least_accuracy_to_ask
    from .exit_frontier import exit_frontier
    from .exit_table import ExitTable, collect_exit_logits
    from .frontier import Frontier, exact_frontier, oracle_policy, shared_threshold_frontier
    from .genetic import GeneticSearchResult, genetic_search
    from .policy import evaluate_policies
except ImportError:
    require_extra("calibrate", "`hf_scan.calibration`")
    raise


__all__ = [
    "CannotCertifyError",
    "Certificate",
    "ExitTable",
    "Frontier",
    "GeneticSearchResult",
    "RiskBound",
    "answering_column",
    "calibrate",
    "certify",
    "certify_thresholds",
    "collect_exit_logits",
    "evaluate_policies",
    "exact_frontier",
    "exit_frontier",
    "genetic_search",
    "least_accuracy_to_ask",
    "oracle_policy",
    "shared_threshold_frontier",
]
