"""What `gpu.sh` measures, against the limits to meet."""
