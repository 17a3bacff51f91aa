"""Integer noise in shares: the sum of many clients under masks that are simulated."""
