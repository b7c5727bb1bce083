"""Tests of turbo_opt.calibration.jobs."""
