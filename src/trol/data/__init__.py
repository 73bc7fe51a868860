"""Data: conversations to token rows, pictures, batches, and the built-in boards."""
