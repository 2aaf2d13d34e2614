"""What each operator means: its public functions, checks, gradients and schema; one folder for each operator."""
