"""Artifacts: what a recipe compiles to, as a directory that outlives the process.

manifest.json                    digests of every file, and all that is not a graph or a weight
denoisers/<name>.pt2             the weight-free graph, as torch.export writes it
denoisers/<name>-00001.safetensors …   the weights
replay/<name>.safetensors        a small input and the output it gave where it was made
report.json, report.md, report.html
"""
