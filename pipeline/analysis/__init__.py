"""What results mean: baselines, tables, scaling laws, transitions, interventions in the teacher, and pictures.

Rows of results and vectors come in; numbers with intervals, text and figures go out. Nothing here writes a file or
asks a server.
"""
