"""The HTTP API: OpenAI's files, fine-tuning jobs and models, and our own under /v1/safety."""

from cluster.api.app import create_app
from cluster.api.services import Services

__all__ = ["Services", "create_app"]
