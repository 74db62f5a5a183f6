"""What scoring rows with SQSD costs: `python -m benchmarks.sqsd`."""
