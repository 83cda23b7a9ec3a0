"""Demo: a tiny world, its pairs and a tiny base, on which every part of the system runs."""
