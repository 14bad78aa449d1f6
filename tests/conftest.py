"""What holds for the whole run."""

import signal

# Whoever runs the tests in the background or without a terminal may have them ignore these, and so would every command that
# the tests start, which heeds that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
