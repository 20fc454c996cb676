"""The metric exact match of answers for the ``evaluate`` library."""
