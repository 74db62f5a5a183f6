"""The safety gate: which served weights may answer, decided by probes. See docs/safety-gate.md."""
