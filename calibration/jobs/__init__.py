"""Jobs of `turbo-opt calibrate`: their schema, and how they are read."""
