"""Kinds of student, what they minimise, and the one trainer.

Cells and data come in; trained students go out. The choice of cells, their division among workers and the storage of
results belong to later rooms.
"""
