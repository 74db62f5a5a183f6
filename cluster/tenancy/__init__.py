"""Who may do what: tenants, their keys, quotas and policy, and the log of what was changed."""
