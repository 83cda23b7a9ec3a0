"""Pairs to a trained model."""
