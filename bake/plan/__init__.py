"""Every edit, decided before a byte moves."""
