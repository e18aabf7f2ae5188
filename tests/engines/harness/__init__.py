"""Bakes of many families run in other engines, each in an environment of its own, and what came out."""
