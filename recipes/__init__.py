"""The shipped recipes: a folder per model, a file per machine. See docs/recipes.md."""
