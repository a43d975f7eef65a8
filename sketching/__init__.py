"""Random projections and distance structures."""
