"""Human-value detection in arguments (SemEval-2023 task 4; arXiv 2301.13771 for the data, 2403.09720 for the methods).

    arguments    the twenty values, the public TSV files, a synthetic set of the same form
    scores       the official score, per-label F1, thresholds, bootstrap intervals, published results
    states       token ids, and hidden states of every block
    probe        logistic regressions on frozen states
    fine_tuning  all weights trained with a head
    prompting    log-probabilities of yes and no

:mod:`workbench.evaluation.suites.human_values` is the suite.
"""
