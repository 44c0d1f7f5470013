"""unweave takes the activations of any neural network apart into sparse features."""

__version__ = "0.1.0"
