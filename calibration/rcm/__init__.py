"""Distilling a guided many-step model into one of one to four steps (rCM, arXiv 2510.08431).

trigflow   the notation of consistency models, and that of the denoisers
tangents   how a prediction changes along the teacher's path
losses     consistency, distribution matching and the fake score's
times      which noise levels are trained
objective  student, teacher and fake score in the training loop
schema     what a job says
run        jobs of `turbo-opt calibrate rcm`
"""
