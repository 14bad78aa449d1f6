"""One QMP session: connect, monitor, jobs, discovery, flush, bitmaps, the private storage daemon."""
