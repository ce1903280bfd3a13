"""A causal language model by name, and its residual stream.

A name, folder or file comes in; a loaded model and the residual stream of prompts go out. What is done with the vectors
belongs to later rooms.
"""
