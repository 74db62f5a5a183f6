"""What moves jobs from phase to phase, and survives being killed while it does."""
