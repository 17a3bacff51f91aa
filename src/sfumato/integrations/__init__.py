"""Other people's systems. Each is an optional extra, and nothing here is imported by the rest of the library."""
