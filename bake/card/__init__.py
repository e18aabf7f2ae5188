"""The model card and its figures."""
