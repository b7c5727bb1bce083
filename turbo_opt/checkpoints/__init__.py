"""Weights from elsewhere: where they lie, what their names mean, and what they say of themselves.

Files of several projects hold the same networks under other names. Everything here is read as
data, lazily: names and shapes at once, numbers when a weight is saved.
"""
