"""Jobs of `turbo-opt calibrate`: their schema, how they are read, and what all of them do."""
