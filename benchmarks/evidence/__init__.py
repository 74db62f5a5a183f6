"""Which constraints protect, by how much, at what price: grids of runs that can be resumed.

Run ``python -m benchmarks.evidence --help``. `cells`: what a cell is and where it lies; `runner`:
runs them; `parts`: the grids, `constraints` (with `arms`, `tasks`, `tenants`) and `fifths` (with
`rankings`); `results`, `statistics`, `claims`: what is made of the numbers; `report`: the page.
"""
