"""What the control plane knows: tables, sessions that belong to one tenant, and migrations."""

from cluster.state.database import Database
from cluster.state.sessions import TenantSession, narrowed

__all__ = ["Database", "TenantSession", "narrowed"]
