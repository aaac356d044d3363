"""One file per verb: what its result has to show, in the order in which it is read."""
