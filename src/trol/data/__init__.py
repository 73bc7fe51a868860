"""Rows, pictures, boards and questions, and the batches of tokens and labels made of them.

It may import `errors`, `strict`, `files`, `host`, and of `depth` the roles.
"""
