"""Serving one base model with many tenants' adapters. See docs/serving.md."""
