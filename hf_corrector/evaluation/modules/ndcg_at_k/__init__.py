"""The metric nDCG@k for the ``evaluate`` library."""
