"""Everything learned from data: tuning, distillation, merging weights, quantization scales."""
