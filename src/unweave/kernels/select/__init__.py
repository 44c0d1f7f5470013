"""Selection: which pre-activations become entries of the code."""
