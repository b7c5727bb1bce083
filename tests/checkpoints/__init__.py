"""Weights from elsewhere: names, places, layouts, LoRA."""
