#!/bin/bash
# Hands signals on to the command and to all that it has started, and stays until the last of these is gone: a launcher
# leaves before the processes that it has launched have closed their runs.
set -m
"$@" &
group=$!
trap 'kill -INT -- "-$group"' INT TERM
wait "$group"
code=$?
while kill -0 "$group" 2>/dev/null; do # a signal has ended the waiting, not the command
  wait "$group"
  code=$?
done
while kill -0 -- "-$group" 2>/dev/null; do
  sleep 0.1
done
exit "$code"
