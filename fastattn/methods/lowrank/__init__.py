"""Low ranks fitted to a head: basis functions, landmarks, the search for a rank."""
