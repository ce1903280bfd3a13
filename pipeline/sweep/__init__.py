"""Grids of cells, trained side by side by any number of workers.

A grid comes in; rows of results go out. How a cell is trained belongs to `training`, what its row means to `analysis`.
"""
