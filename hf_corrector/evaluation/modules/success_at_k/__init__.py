"""The metric Success@k for the ``evaluate`` library."""
