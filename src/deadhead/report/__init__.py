"""Reports for people: the head map, the tables of a run, and its page for a browser, as a file or live."""
