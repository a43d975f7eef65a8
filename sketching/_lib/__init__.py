"""The private foundation of sketching, fastattn and lowerbounds."""
