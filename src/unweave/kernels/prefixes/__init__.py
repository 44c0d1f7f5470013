"""Nested reconstructions: every prefix of the features has to explain the target."""
