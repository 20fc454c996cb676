"""Trainers and what they share."""
