"""What ships with a trained student: text in, vectors out, with NumPy and a tokenizer.

A student's folder comes in; vectors of any text go out. No torch, no MLflow and nothing of training belongs here: a
student that MLflow logs carries this room's code along.
"""
