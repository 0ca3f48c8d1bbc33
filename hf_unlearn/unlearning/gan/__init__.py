"""GANs that forget."""
