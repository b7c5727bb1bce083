"""Recipes: their schema, how they are found, read, extended and overridden."""
