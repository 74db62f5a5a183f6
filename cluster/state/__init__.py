"""What the control plane knows: tables, sessions that belong to one tenant, and migrations."""

from cluster.state.database import UNAVAILABLE, Database, DatabaseError
from cluster.state.sessions import TenantSession, narrowed

__all__ = ["UNAVAILABLE", "Database", "DatabaseError", "TenantSession", "narrowed"]
