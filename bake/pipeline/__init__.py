"""The export, top to bottom: recipe, decision, record."""
