"""A teacher's vectors of many concepts, in one vectors file.

A request comes in; a vectors file, its vocabulary and their audit go out, in parts that survive an interruption.
Nothing here trains or tracks.
"""
