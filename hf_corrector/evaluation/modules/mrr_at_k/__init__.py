"""The metric MRR@k for the ``evaluate`` library."""
