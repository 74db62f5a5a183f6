"""The demo: two tenants, one benign and one poisoned, through the whole main job."""
