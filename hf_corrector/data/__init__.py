"""Texts and files: retrieval data sets, the embedded default, pre-tokenised texts and batches; knows no model."""
