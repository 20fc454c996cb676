"""Judgement: how good each index is, what correction recovers, and how close the sampler is to the exact one."""
