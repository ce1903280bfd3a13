"""Concepts, and the vectors file that all training reads.

Lists and files of users come in; a catalogue with its split, a vectors file, and both as features and targets go out.
Nothing here knows a teacher, a student being trained, or where results go.
"""
