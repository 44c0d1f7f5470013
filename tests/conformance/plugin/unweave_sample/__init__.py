"""A package that is not unweave's, with a method of its own."""
