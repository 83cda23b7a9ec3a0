"""Publishing: a trained model as a repository that others load."""
