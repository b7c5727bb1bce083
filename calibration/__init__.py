"""Everything learned from data: tuning, distillation, merging weights, quantization scales.

jobs        what a training is told: one YAML file, checked with its line numbers
data        clips as latents with text embeddings: read, ordered, made from a teacher
networks    denoisers of a diffusers folder as networks that can be trained, sharded or not
training    one loop for every objective: FSDP2, checkpoints that can be resumed, logs
sla         sparse-linear attention that can be trained, its tuning and its closed form
sla2        the same with a learned router and ratio
rcm         distillation into one to four steps
tiny_wan    how the model inside the package was trained
"""
