"""A tiny world, its pairs and a tiny base: the system in the small."""
