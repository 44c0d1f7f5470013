"""From the entries of a code to new weights: row gradients and their Adam step in one pass."""
