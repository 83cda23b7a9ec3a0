"""Embeds a corpus, searches it, serves a model: vectors with the fingerprint of the model that made them."""
