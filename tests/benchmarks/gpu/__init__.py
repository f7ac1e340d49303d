"""What `gpu.sh` measures, against what is asked for."""
