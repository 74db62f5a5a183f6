"""What serving reaches: ``python -m benchmarks.serving [--quick] [--only PART] [--json FILE]``."""
