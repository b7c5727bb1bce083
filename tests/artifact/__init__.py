"""Tests of turbo_opt.artifact."""
