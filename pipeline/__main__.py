"""``python -m pipeline COMMAND``."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while `main` does not handle signals
    from pipeline.cli import main

    main()
