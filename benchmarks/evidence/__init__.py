"""Which constraints protect, by how much, at what price: grids of runs that can be resumed.

Run ``python -m benchmarks.evidence --help``. One file a concern: `cells` (what a cell is and where
it lies), `runner`, `constraints` (the grid of the constraints), `tasks`, `tenants` (what the tenant
asks and plants), `results`, `statistics`, `claims`, `report`, `plots`.
"""
