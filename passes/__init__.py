"""The passes, one file each. `turbo_opt.compiler.base.registered_passes` finds them by name."""
