"""Kinds of student, what they minimise, and the one trainer.

Cells and data come in; trained students go out. Where cells come from, which worker trains them and where results go
belongs to later rooms.
"""
