"""Tests of turbo_opt.calibration.data."""
