"""Random projections that preserve lengths, or inner products of powers."""
