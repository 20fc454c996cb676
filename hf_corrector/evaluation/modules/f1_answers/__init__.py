"""The metric F1 of answers for the ``evaluate`` library."""
