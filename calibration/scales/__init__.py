"""What each layer loses to 8 bits and to sparsity: the measurements of `calibrate scales`."""
