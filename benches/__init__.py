"""What is measured: ratios in one run, and only of correct answers."""
