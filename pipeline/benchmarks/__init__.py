"""Vectors judged by data that nobody in this project wrote: human ratings, analogies, categories, attributes.

Enter: phrases' vectors of a teacher, of students and of tables. Leave: scores, and the share of the teacher's score
that each retains. What trains a student or chooses one never belongs here.
"""
