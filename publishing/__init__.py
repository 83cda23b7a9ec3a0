"""A trained model to a repository that others load."""
