"""Adam on the rows of a weight matrix, with what goes with it: clipping, unit norm, a bfloat16 shadow."""
