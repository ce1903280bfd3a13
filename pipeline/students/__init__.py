"""Students: small models from a concept's text to its activation vector."""

from pipeline.students.student import STUDENTS, Student

__all__ = ["STUDENTS", "Student"]
