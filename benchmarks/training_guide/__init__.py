"""The first section of docs/training.md, run as it is written, timed and judged.

    python -m benchmarks.training_guide --work work/guide --budget 560 --out benchmarks/results
    python -m benchmarks.training_guide --work work/guide --tiny         # a CPU, less of everything

The YAML files of the section are written into `--work`, and its commands run there one after the
other, each by `python -m turbo_opt`. Then held-out captions are drawn by the artifact that they
end with, by the student that it is made of and by the teacher, and judged by the analytic
detectors. The record is how many minutes the commands took in all.

`--budget` is for machines that are lent for minutes: no training begins that would not end in it,
what still runs then is stopped, and the same command line goes on from there, trainings by their
own `--resume`; with `--cut` they begin as long as a minute is left. What a stopped training did
after its last checkpoint is done again, and counted.
"""
