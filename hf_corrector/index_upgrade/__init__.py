"""From an old cache and a new encoder to a decision; the function is ``hf_corrector.upgrade``."""
