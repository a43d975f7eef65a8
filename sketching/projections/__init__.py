"""Random projections that keep lengths, or inner products of powers."""
