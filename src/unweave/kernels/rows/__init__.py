"""Rows before and after the sparse part of a step: centre and measure them, sum them."""
