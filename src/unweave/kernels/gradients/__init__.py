"""Closed-form gradients of sparse encode and decode."""
