"""One file a command: it reads settings, calls the other rooms in their order, and prints.

Options come in; an exit, files and lines for a person go out. No method that another command may need belongs here.
"""
