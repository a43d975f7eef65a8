"""Cost model: the work of a method, and its time on this machine."""
