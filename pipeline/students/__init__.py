"""Kinds of student, as they train: small models from a concept's text to its activation vector."""

from pipeline.students.kinds import KINDS, Kind

__all__ = ["KINDS", "Kind"]
