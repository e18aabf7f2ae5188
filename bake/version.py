"""The version of bake that is running."""

__version__ = "0.1.0"
