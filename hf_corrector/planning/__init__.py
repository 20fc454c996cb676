"""The planner: from a small probe, what correction will recover, for how long, and what to re-embed first."""
