"""What the constraints cost: `python -m benchmarks.constraints`."""
