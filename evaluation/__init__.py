"""A model and pairs to figures."""
