"""One file a command: it reads settings, calls the other rooms in their order, and prints.

Options come in; an exit, files and lines for a person go out. `display` and `find_sweep` serve several commands, and
`page` the report; no other method that another command may need belongs here.
"""
