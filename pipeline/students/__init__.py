"""Students: small models from a concept's text to its activation vector."""

from pipeline.students.kinds import KINDS, Kind
from pipeline.students.student import Student

__all__ = ["KINDS", "Kind", "Student"]
