"""Tests of turbo_opt.calibration.rcm."""
