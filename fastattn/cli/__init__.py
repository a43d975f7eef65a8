"""The command ``fastattn``: its options, the heads of a file, and the demo."""
