"""The metric Recall@k for the ``evaluate`` library."""
