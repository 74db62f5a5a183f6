"""safeft: what the methods compute, on tensors and rows. No Ray, no HTTP, no database."""

__version__ = "0.1.0"
