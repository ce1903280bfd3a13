"""Small students that reproduce a language model's activation vectors from a concept's text."""

__version__ = "0.1.0"
