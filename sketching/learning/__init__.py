"""Online learners of a metric, and the rank-one step that they share."""
