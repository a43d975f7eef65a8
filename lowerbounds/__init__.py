"""Hard instances: where fast attention must fail, as runnable evidence."""
