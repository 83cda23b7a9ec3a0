"""Pairs in, batches out."""
