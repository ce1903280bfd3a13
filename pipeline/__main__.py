"""``python -m pipeline COMMAND``."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before `main` watches for signals, nor after it
    from pipeline.cli import main

    main()
