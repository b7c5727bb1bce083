"""Tests of turbo_opt.calibration.sla2."""
