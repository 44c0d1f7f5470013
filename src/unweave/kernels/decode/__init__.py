"""Decoding: sums of atoms, weighted by the values of a code."""
