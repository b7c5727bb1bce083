"""Tests of turbo_opt.calibration.training."""
