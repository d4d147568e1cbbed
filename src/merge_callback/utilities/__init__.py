"""General helpers: background work, argument checks, files, messages and tables."""
