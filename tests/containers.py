"""Docker for the tests: the command line, and the image's name."""

import subprocess

IMAGE = "activation-distillation"


def docker(*arguments, check=True, **options):
    done = subprocess.run(["docker", *map(str, arguments)], capture_output=True, text=True, check=False, **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout if check else done
