"""The cost of a method: its work, and the seconds that this machine takes for it."""
