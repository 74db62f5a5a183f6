"""The status page: jobs, models and the fleet in a browser. Server-rendered, read-only.

Read through the same sessions as the API's answers (`cluster.state.sessions`), so a page holds
nothing that the key which opened the browser's session could not read there.
"""

from cluster.api.pages.app import create_pages
from cluster.api.pages.render import ROOT

__all__ = ["ROOT", "create_pages"]
