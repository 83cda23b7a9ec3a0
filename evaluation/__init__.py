"""Evaluates models on pairs and suites of tasks."""
