"""Tests of turbo_opt.runtime."""
