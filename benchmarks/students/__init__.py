"""What tiny-wan's students draw, beside the teacher: accuracy, diversity, distance from real clips.

    python -m benchmarks.students --students work/students --out benchmarks/results

Held-out captions, the same first noise for every model. Accuracy is by the analytic detectors.
Diversity is the root mean square difference of two clips of one combination, from other noise and
in other words, as a share of that of drawn clips. The Fréchet distance is to drawn clips of the
same captions (`clip_features`). Models are attended by the operators that train them; those in 8
bits are compiled by the real passes.
"""
