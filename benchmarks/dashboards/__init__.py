"""The dashboards against a real Prometheus filled by a real run, and drawn: see __main__."""
