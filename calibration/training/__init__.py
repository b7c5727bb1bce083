"""One loop that trains whatever an objective says, on one process or on many."""
