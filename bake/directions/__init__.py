"""Finding, reading and combining directions."""
