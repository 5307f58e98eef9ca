"""What people look at: the head map, the tables of a run, and its page in a browser, written or served live."""
