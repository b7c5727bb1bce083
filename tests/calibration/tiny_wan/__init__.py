"""Tests of calibration.tiny_wan."""
